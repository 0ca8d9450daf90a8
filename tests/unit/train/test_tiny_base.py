"""Pretraining of the tiny base: packing, schedule, resuming."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qat.data.generate.corpus import documents
from qat.data.generate.tokenizer import train_tokenizer
from qat.errors import UserError
from qat.train import tiny_base
from qat.train.base import resolve_base
from qat.train.tiny_base import Pretraining, learning_rate, pretrain


def test_rows_start_with_whole_documents() -> None:
    ids = np.arange(1, 31, dtype=np.uint16)  # documents 1..12, 13..20, 21..30
    rows = tiny_base.pack(ids, np.array([12, 20, 30]), 40)
    assert rows.tolist() == [[*range(1, 21), *[0] * 20]]  # 20 of 40 are within the closing margin of 24
    rows = tiny_base.pack(ids, np.array([12, 20, 30]), 26)
    assert rows.tolist() == [[*range(1, 13), *[0] * 14], [*range(13, 21), *[0] * 18], [*range(21, 31), *[0] * 16]]


def test_the_schedule_warms_up_and_ends_low() -> None:
    settings = Pretraining(steps=1000, warmup=100, learning_rate=1e-3, final_learning_rate=1e-5)
    assert learning_rate(0, settings) == pytest.approx(1e-5)
    assert learning_rate(99, settings) == pytest.approx(1e-3)
    assert learning_rate(550, settings) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(1000, settings) == pytest.approx(1e-5)


def test_a_stopped_pretraining_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    settings = Pretraining(documents=40, steps=4, batch=2, length=64, tokenizer_documents=300)
    batches = [torch.randint(3, 900, (2, 64), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    whole = tiny_base._Trainer(settings, "cpu", tmp_path / "none.safetensors")
    for batch in batches:
        whole.train_step(batch)
    first = tiny_base._Trainer(settings, "cpu", tmp_path / "state.safetensors")
    for batch in batches[:2]:
        first.train_step(batch)
    first.save()
    second = tiny_base._Trainer(settings, "cpu", tmp_path / "state.safetensors")
    assert second.step == 2
    for batch in batches[2:]:
        second.train_step(batch)
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), second.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_routing_moves_towards_the_unused_experts(tmp_path: Path) -> None:
    trainer = tiny_base._Trainer(Pretraining(batch=2, balance_step=0.5), "cpu", tmp_path / "none.safetensors")
    ids = torch.randint(3, 900, (2, 64))
    trainer.model(input_ids=ids)
    (router, counts), *_ = trainer.balance._counts.items()
    trainer.balance.apply()
    expected = 0.5 * torch.sign(counts.mean() - counts)
    assert torch.equal(router.e_score_correction_bias, expected)
    assert counts.sum() == 2 * 64 * 2  # two experts a token


def test_a_long_pretraining_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="on a GPU"):
        pretrain(Pretraining(), tmp_path, tmp_path / "out", device="cpu", workers=1, seconds=1)


def test_the_embedded_base_is_what_the_configuration_says() -> None:
    from transformers import AutoModelForCausalLM

    from qat.recipe.schema import BaseBlock

    folder = resolve_base(BaseBlock(model="tiny-base", family="nemotron_h"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert 4.0e6 < model.num_parameters() < 5.0e6
    wanted, found = tiny_base.tiny_config(), model.config
    for key in ("layers_block_type", "hidden_size", "n_routed_experts", "vocab_size", "mamba_num_heads", "head_dim"):
        assert getattr(wanted, key) == getattr(found, key), key
    assert sum(f.stat().st_size for f in folder.iterdir()) < 25 << 20


def test_the_second_base_is_of_the_size_that_is_said() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_base.small_config(8192))
    assert model.num_parameters() == pytest.approx(48.9e6, rel=0.01)


def test_as_many_steps_as_fit_into_the_time(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(3, 200, (80, 32)).astype(np.uint16)
    settings, file, said = Pretraining(batch=1, length=32), tmp_path / "steps.json", []
    fitted = tiny_base._fitted(settings, "cpu", rows, 256, file, 10.0, said.append)
    kept = json.loads(file.read_text())
    assert fitted.steps == kept["steps"]
    assert fitted.steps == pytest.approx(10.0 / kept["seconds_a_step"], rel=0.01)
    assert len(said) == 1
    again = tiny_base._fitted(settings, "cpu", rows[:0], 256, file, 99.0, said.append)  # nothing is measured again
    assert again == fitted


def test_texts_of_ones_own_are_read_besides(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    train_tokenizer(documents(3, 0, 200), 1024).save_pretrained(texts / "tokenizer")
    np.save(texts / "train.npy", np.full((3, 64), 777, np.uint16))
    settings = Pretraining(documents=40, length=64, texts_copies=2)
    rows, corpus, folder = tiny_base._corpus(settings, tmp_path / "work", 1, texts, lambda _: None)
    assert (rows[-6:] == 777).all()
    assert not (rows[:-6] == 777).all(axis=1).any()
    assert corpus["rows"] == len(rows) - 6
    assert corpus["texts"] == {"rows": 3, "tokens": 192, "copies": 2}
    assert corpus["vocabulary"] == 1024
    assert (folder / "tokenizer.json").read_bytes() == (texts / "tokenizer" / "tokenizer.json").read_bytes()
