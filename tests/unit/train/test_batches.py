from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from qat.data.render import IGNORED
from qat.errors import UserError
from qat.train import compare
from qat.train.batches import (
    EVALUATION_BATCH,
    Sample,
    collate,
    encode_file,
    evaluation_order,
    target_mask,
    training_order,
)
from qat.train.compare import hidden_of_rows
from qat.train.objective import hidden_states
from tests.tiny_models import nemotron_h_tiny
from tests.unit.train.conftest import Small

LENGTHS = random.Random(3).choices(range(5, 91), k=37)


def test_every_epoch_visits_every_row_once() -> None:
    order = training_order(LENGTHS, batch_size=4, seed=1, epochs=3)
    assert len(order) == 3 * 10
    for epoch in range(3):
        rows = [row for batch in order[epoch * 10 : (epoch + 1) * 10] for row in batch]
        assert sorted(rows) == list(range(37))


def test_a_longer_training_begins_like_a_shorter_one() -> None:
    """Going on after a kill counts batches, so the order must not depend on how long the training is."""
    assert training_order(LENGTHS, 4, seed=1, count=25) == training_order(LENGTHS, 4, seed=1, count=40)[:25]
    assert training_order(LENGTHS, 4, seed=1, count=20) == training_order(LENGTHS, 4, seed=1, epochs=2)


def test_order_depends_on_the_seed_and_the_epoch() -> None:
    order = training_order(LENGTHS, 4, seed=1, epochs=2)
    assert order != training_order(LENGTHS, 4, seed=2, epochs=2)
    assert order[:10] != order[10:]


def test_order_is_the_same_on_every_machine() -> None:
    """Values written down once: Python's generator is specified, `sorted` is stable."""
    assert training_order([3, 9, 4, 8, 5, 7], 2, seed=7, epochs=1) == [[1, 3], [5, 4], [2, 0]]


def test_grouping_by_length_pads_less_than_chance() -> None:
    lengths = random.Random(5).choices(range(5, 501), k=400)

    def padding(order: list[list[int]]) -> int:
        return sum(max(lengths[row] for row in rows) - lengths[row] for rows in order for row in rows)

    shuffled = random.Random(0).sample(range(400), 400)
    by_chance = [shuffled[start : start + 8] for start in range(0, 400, 8)]
    assert padding(training_order(lengths, 8, seed=0, epochs=1)) < padding(by_chance) / 3


def test_evaluation_order_is_by_length_and_complete() -> None:
    order = evaluation_order(LENGTHS)
    rows = [row for batch in order for row in batch]
    assert sorted(rows) == list(range(37))
    assert [LENGTHS[row] for row in rows] == sorted(LENGTHS, reverse=True)
    assert {len(batch) for batch in order[:-1]} == {EVALUATION_BATCH}


def test_targets_by_hand() -> None:
    sample = Sample("a", "c", [10, 11, 12, 13, 14], [IGNORED, IGNORED, 12, IGNORED, 14])
    shorter = Sample("b", "c", [20, 21], [IGNORED, 21])
    assert target_mask(sample, "replies") == [False, True, False, True, False]
    assert target_mask(sample, "all") == [True, True, True, True, False]
    batch = collate([sample, shorter], [1, 0], "replies")
    assert batch.input_ids.tolist() == [[20, 21, 0, 0, 0], [10, 11, 12, 13, 14]]
    assert batch.targets.tolist() == [[21, -100, -100, -100, -100], [-100, 12, -100, 14, -100]]
    everything = collate([sample, shorter], [1, 0], "all")
    assert everything.targets.tolist() == [[21, -100, -100, -100, -100], [11, 12, 13, 14, -100]]


def test_padding_never_reaches_a_target() -> None:
    """Without attention mask a padded row gives what the row gives alone (float32, so that only rounding differs)."""
    model = nemotron_h_tiny(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number, length in enumerate((40, 13, 27, 5)):
        ids = torch.randint(0, 512, (length,), generator=generator).tolist()
        samples.append(Sample(str(number), "c", ids, ids))
    together = hidden_of_rows(model, samples, range(4), "all")
    for row, sample in enumerate(samples):
        with torch.no_grad():
            alone = model.model(input_ids=torch.tensor([sample.input_ids])).last_hidden_state[0, :-1]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)


def test_hidden_of_rows_keeps_rows_apart() -> None:
    model = nemotron_h_tiny(dtype=torch.float32)
    samples = [
        Sample(str(n), "c", list(range(n, n + 8 + n)), [IGNORED] * 5 + list(range(n + 5, n + 8 + n))) for n in range(3)
    ]
    kept = hidden_of_rows(model, samples, [2, 0, 2], "replies")
    assert set(kept) == {0, 2}
    assert [len(kept[row]) for row in (0, 2)] == [3, 5]
    batch = collate(samples, [2], "replies")
    torch.testing.assert_close(
        kept[2], hidden_states(model, batch.input_ids, batch.targets).detach(), rtol=1e-4, atol=1e-4
    )


def test_many_answers_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as in memory; a file only above the limit; refused where the disk has no room."""
    model = nemotron_h_tiny()
    ids = [[row * 7 + place for place in range(6 + row)] for row in range(11)]
    samples = [Sample(str(number), "c", row, row) for number, row in enumerate(ids)]
    spill = tmp_path / "folder" / "teacher.bin"
    inside = hidden_of_rows(model, samples, range(11), "all", spill)
    assert not spill.exists()
    size = sum(len(row) - 1 for row in ids) * 64 * 2
    monkeypatch.setattr(compare, "KEPT_IN_MEMORY", size - 1)
    outside = hidden_of_rows(model, samples, range(11), "all", spill)
    assert spill.stat().st_size == size
    assert all(torch.equal(inside[row], outside[row]) for row in range(11))
    assert torch.frombuffer(bytearray(spill.read_bytes()[: 2 * 64]), dtype=torch.bfloat16).equal(inside[0][0])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=size - 1))
    with pytest.raises(UserError, match="no room for the teacher's answers"):
        hidden_of_rows(model, samples, range(11), "all", spill)


def test_encode_file_supervises_the_reply_alone(small: Small) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small.base)
    encoded = encode_file(small.train, tokenizer, 64)
    first = json.loads(small.train.read_text(encoding="utf-8").splitlines()[0])
    sample = encoded.samples[0]
    supervised = [label for label in sample.labels if label != IGNORED]
    assert tokenizer.decode(supervised) == first["messages"][2]["content"] + " <|im_end|>"
    assert (sample.category, sample.id, encoded.truncated) == ("even", "1-0", 0)


def test_encode_file_counts_what_it_cuts(small: Small) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small.base)
    whole = encode_file(small.train, tokenizer, 64)
    longest = max(len(sample.input_ids) for sample in whole.samples)
    cut = encode_file(small.train, tokenizer, longest - 1)
    over = [sample for sample in whole.samples if len(sample.input_ids) == longest]
    assert (cut.truncated, cut.dropped_tokens) == (len(over), len(over))


def test_empty_file(tmp_path: Path, small: Small) -> None:
    (tmp_path / "none.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError):
        encode_file(tmp_path / "none.jsonl", AutoTokenizer.from_pretrained(small.base), 64)
