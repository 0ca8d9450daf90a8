from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat.data.render import IGNORED
from qat.errors import UserError
from qat.recipe.schema import RepliesBlock
from qat.train import replies
from qat.train.base import load_base, load_tokenizer
from qat.train.batches import Sample, encode_file
from qat.train.replies import persona_replies
from tests.unit.train import world
from tests.unit.train.conftest import Small


@pytest.fixture(scope="module")
def tokenizer(small: Small) -> PreTrainedTokenizerBase:
    return load_tokenizer(world.recipe(small.base).base, small.base)


@pytest.fixture(scope="module")
def samples(small: Small, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    return encode_file(small.train, tokenizer, 64).samples


def _persona(small: Small) -> PreTrainedModel:
    """In float32, where a cached and an uncached forward agree on the likeliest token."""
    return load_base(small.base).float()


def _ask(small: Small, samples: list[Sample], block: RepliesBlock, keep: Path, **changes: Any) -> list[Sample]:
    settings: dict[str, Any] = {"max_length": 64, "seed": 3, "tokenizer": None, "fingerprint": "f"}
    return persona_replies(_persona(small), samples, block, keep=keep, **settings | changes)


def test_greedy_replies_are_the_model_s_own_words(small: Small, samples: list[Sample], tmp_path: Path) -> None:
    """Each word is the likeliest after those before it; the oracle runs the whole row at once, without a cache."""
    block = RepliesBlock(count=3, max_new_tokens=5, temperature=0.0)
    written = _ask(small, samples, block, tmp_path / "kept.jsonl")
    by_id = {sample.id: sample for sample in samples}
    assert {row.id for row in written} == {f"{samples[index].id}/persona" for index in (0, 8, 16)}
    model = _persona(small)
    others = 0
    for row in written:
        original = by_id[row.id.removesuffix("/persona")]
        start = next(index for index, label in enumerate(original.labels) if label != IGNORED)
        reply, end = row.input_ids[start:], original.labels[-1]
        assert row.input_ids[:start] == original.input_ids[:start]
        assert row.labels == [IGNORED] * start + reply
        assert end not in reply[:-1] and (len(reply) == 5 or reply[-1] == end)
        ids = torch.tensor([row.input_ids], device=model.device)
        with torch.no_grad():
            likeliest = model(input_ids=ids).logits[0, start - 1 : -1].argmax(dim=-1)
        others += int((likeliest != ids[0, start:]).sum())
        assert row.category == original.category
    # A GPU's scan multiplies in TF32 and a step with a cache does not: where two words or experts are nearly tied, the
    # other one may be taken.
    assert others <= (3 if model.device.type == "cuda" else 0)


def test_replies_end_with_the_turn(
    small: Small, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = samples[0].labels[-1]
    model = load_base(small.base)

    def generate(_: Any, ids: torch.Tensor, **__: Any) -> torch.Tensor:
        return torch.cat([ids, ids.new_tensor([[7, end, end]] * len(ids))], dim=1)

    monkeypatch.setattr(type(model), "generate", generate)
    written = persona_replies(
        model,
        samples[:4],
        RepliesBlock(count=4),
        max_length=64,
        seed=0,
        tokenizer=None,  # type: ignore[arg-type]
        keep=tmp_path / "kept.jsonl",
        fingerprint="f",
    )
    assert len(written) == 4 and all(row.input_ids[-2:] == [7, end] for row in written)


def test_the_last_reply_of_several_turns_is_written_anew() -> None:
    row = Sample("a", "c", [1, 2, 3, 4, 5, 6, 7], [IGNORED, 2, 3, IGNORED, IGNORED, 6, 7])
    assert replies._last_reply(row) == 5
    cut = Sample("b", "c", [1, 2, 9], [IGNORED, 2, 9])
    assert replies._end_of_turn([row, row, cut]) == 7


def test_written_rows_are_kept_for_a_run_that_goes_on(small: Small, samples: list[Sample], tmp_path: Path) -> None:
    block = RepliesBlock(count=2, max_new_tokens=3)
    first = _ask(small, samples, block, tmp_path / "kept.jsonl")
    lines = (tmp_path / "kept.jsonl").read_text(encoding="utf-8").splitlines()
    changed = [lines[0], *(json.dumps(json.loads(line) | {"category": "kept"}) for line in lines[1:])]
    (tmp_path / "kept.jsonl").write_text("\n".join(changed), encoding="utf-8")
    assert {row.category for row in _ask(small, samples, block, tmp_path / "kept.jsonl")} == {"kept"}
    again = _ask(small, samples, block, tmp_path / "kept.jsonl", fingerprint="another")
    assert again == first
    assert _ask(small, samples, block, tmp_path / "other.jsonl", seed=4) != first


def test_replies_from_a_file(
    small: Small, samples: list[Sample], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    block = RepliesBlock(file=str(small.validation))
    written = _ask(small, samples, block, tmp_path / "kept.jsonl", tokenizer=tokenizer)
    expected = encode_file(small.validation, tokenizer, 64).samples
    assert [row.input_ids for row in written] == [row.input_ids for row in expected]
    assert all(row.id.endswith("/persona") for row in written) and not (tmp_path / "kept.jsonl").exists()


def test_more_replies_than_conversations(small: Small, samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more conversations than there are"):
        _ask(small, samples, RepliesBlock(count=25), tmp_path / "kept.jsonl")
    with pytest.raises(UserError, match="wrote no reply"):
        _ask(small, samples, RepliesBlock(count=2), tmp_path / "kept.jsonl", max_length=4)
