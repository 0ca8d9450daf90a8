"""Training on a packed base and training all weights, from fine-tuning to the exported bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qat.calibration import calibrate
from qat.errors import UserError
from qat.export import export_checkpoint
from qat.quant.effective import effective_weight
from qat.quant.modelopt import quantizers
from qat.quant.nvfp4 import fake_quant_weight
from qat.quant.packed import PackedWeight, packed_base_sha256
from qat.quant.state import QuantState
from qat.recipe.schema import Recipe
from qat.train.adapters import load_adapter
from qat.train.base import base_sha256, load_base, load_tokenizer, training_device
from qat.train.batches import encode_file
from qat.train.distill import distill
from qat.train.divergence import measure
from qat.train.persona import load_persona, packed_below, standing_on
from qat.train.sft import train_sft, validation_loss
from qat.train.student import quantize_
from tests.tiny_models import token_ids
from tests.unit.train import world
from tests.unit.train.conftest import Small

# The E2M1 values by code, sign bit last (OCP Microscaling Formats, table 5).
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


class Trained(NamedTuple):
    """What a chain left: folders, and the reports of its trainings."""

    recipe: Recipe
    persona: Path
    calibration: Path
    student: Path
    folder: Path
    sft: dict[str, Any]
    distilled: dict[str, Any]


def _train(small: Small, root: Path, left: str, **modes: str) -> Trained:
    rate = {"learning_rate": 5e-3} if modes.get("trains") == "all" else {}
    recipe = world.recipe(
        small.base, sft={"epochs": 1, **rate}, distill={"max_steps": 4, "eval_every": 2, "batch_size": 2}
    )
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=modes)})
    sft = train_sft(recipe, small.base, small.train, small.validation, root / "sft")
    persona, state = root / "sft" / left, root / "calibration" / "quant_state.safetensors"
    calibrate(recipe, "all", small.base, persona, small.train, root / "calibration")
    distilled = distill(recipe, small.base, persona, state, small.train, small.validation, root / "distill")
    return Trained(recipe, persona, state, root / "distill", root, sft.to_json(), distilled.to_json())


@pytest.fixture(scope="module")
def packed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return _train(small, tmp_path_factory.mktemp("packed"), "adapter", memory="nvfp4")


@pytest.fixture(scope="module")
def full(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return _train(small, tmp_path_factory.mktemp("full"), "model", trains="all")


def _held_out_loss(small: Small, trained: Trained) -> float:
    tokenizer = load_tokenizer(trained.recipe.base, small.base)
    samples = encode_file(small.validation, tokenizer, trained.recipe.data.max_length).samples
    persona = load_persona(small.base, trained.persona, standing_on(small.base, trained.persona))
    return validation_loss(persona, samples)


def _unpacked(stored: dict[str, Tensor], name: str, experts: int | None) -> Tensor:
    if experts is not None:
        prefix, _, leaf = name.rpartition(".")
        return torch.stack([_unpacked(stored, f"{prefix}.{expert}.{leaf}", None) for expert in range(experts)])
    codes = stored[f"{name}.weight"]
    values = VALUES[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]
    steps = stored[f"{name}.weight_scale"].float() * stored[f"{name}.weight_scale_2"]
    return (values * steps.repeat_interleave(16, -1)).bfloat16()


def _require_served_is_computed(student: torch.nn.Module, out: Path, differing: int = 0) -> None:
    """The output of every weight quantizer in a forward is what the export unpacks to, but in `differing` places."""
    used: dict[str, Tensor] = {}
    for name, pair in quantizers(student).items():
        pair.weight.register_forward_hook(lambda _, __, output, name=name: used.update({name: output.detach().cpu()}))
    with torch.no_grad():
        student(input_ids=token_ids().to(training_device()))
    stored = load_file(out / "model.safetensors")
    assert len(used) == 14
    found = {
        name: int((weight != _unpacked(stored, name, len(weight) if weight.dim() == 3 else None)).sum())
        for name, weight in used.items()
    }
    assert sum(found.values()) <= differing, found


def test_a_persona_on_a_packed_base_is_what_was_validated(small: Small, packed: Trained) -> None:
    assert packed.sft["packed"] == packed.distilled["packed"] == 14 and len(packed_below(packed.persona)) == 14
    assert packed.sft["loop"]["best"] < packed.sft["loop"]["first"]
    assert _held_out_loss(small, packed) == packed.sft["loop"]["best"]
    digest = packed_base_sha256(base_sha256(small.base), packed_below(packed.persona))
    assert packed.sft["base_sha256"] == digest == QuantState.load(packed.calibration).base_sha256
    persona = load_persona(small.base, packed.persona, digest)
    kept = [parameter for parameter in persona.parameters() if isinstance(parameter, PackedWeight)]
    assert len(kept) == 14 and all(len(weight.low_rank) == 1 for weight in kept)


@pytest.mark.parametrize("mode", ["packed", "full"])
def test_the_divergence_from_files_alone(small: Small, mode: str, request: pytest.FixtureRequest) -> None:
    trained: Trained = request.getfixturevalue(mode)
    left = trained.student / trained.persona.name
    arms = {
        "persona": (None, None),
        "ptq": (None, trained.calibration),
        "qad": (left, trained.student / "quant_state.safetensors"),
    }
    found = measure(trained.recipe, small.base, trained.persona, arms, small.validation)
    assert found["persona"].replies.kl == 0.0
    assert found["ptq"].replies.kl == trained.distilled["loop"]["first"]
    assert found["qad"].replies.kl == trained.distilled["loop"]["best"]


def test_a_packed_base_is_exported_as_it_was_trained(small: Small, packed: Trained) -> None:
    adapters = [packed.persona, packed.student / "adapter"]
    state = packed.student / "quant_state.safetensors"
    out = packed.folder / "out"
    report = export_checkpoint(small.base, out, adapters=adapters, quant_state=state)
    assert report.packed_base == 14 and report.verification.differing_bytes == 0
    digest = standing_on(small.base, packed.persona)
    student = load_adapter(
        load_persona(small.base, packed.persona, digest),
        packed.student / "adapter",
        digest,
        parent=packed.sft["adapter_sha256"],
    )
    quantize_(student, small.base, QuantState.load(state))
    # A GPU adds W + s B A up in another order than the CPU that exports. Of 3.3 million such values one came out one
    # BF16 digit apart and no code did; where that digit belongs to the largest value of a block, it moves the block.
    _require_served_is_computed(student, out, differing=16 if training_device().type == "cuda" else 0)


def test_the_bf16_arm_of_a_packed_base(small: Small, packed: Trained) -> None:
    """By hand: each weight through its own four bits, then the adapter's factors, one rounding; others untouched."""
    export_checkpoint(small.base, packed.folder / "bf16", adapters=[packed.persona])
    written, base = load_file(packed.folder / "bf16" / "model.safetensors"), load_file(small.base / "model.safetensors")
    factors = load_file(packed.persona / "adapter_model.safetensors")
    for name in ("layers.0.mixer.in_proj", "layers.2.mixer.o_proj", "layers.3.mixer.shared_experts.up_proj"):
        weight = base[f"backbone.{name}.weight"]
        a, b = (factors[f"base_model.model.model.{name}.lora_{side}.weight"] for side in "AB")
        expected = effective_weight(fake_quant_weight(weight, weight.abs().amax().float()), a, b, 2.0)
        assert torch.equal(written[f"backbone.{name}.weight"], expected)
        assert not torch.equal(expected, effective_weight(weight, a, b, 2.0))
    for name in ("lm_head.weight", "backbone.layers.0.mixer.conv1d.weight", "backbone.layers.1.mixer.gate.weight"):
        assert torch.equal(written[name], base[name])


def test_packed_and_unpacked_never_meet(small: Small, packed: Trained, tmp_path: Path) -> None:
    sha256 = base_sha256(small.base)
    with pytest.raises(UserError, match="another base"):
        load_adapter(load_base(small.base), packed.persona, sha256)
    recipe = world.recipe(small.base, sft={"epochs": 1})
    train_sft(recipe, small.base, small.train, small.validation, tmp_path / "sft")
    plain = tmp_path / "sft" / "adapter"
    with pytest.raises(UserError, match="different forms of the base"):
        export_checkpoint(small.base, tmp_path / "out", adapters=[plain, packed.student / "adapter"])
    with pytest.raises(UserError, match="another base"):
        export_checkpoint(small.base, tmp_path / "out", adapters=[plain], quant_state=packed.calibration)
    with pytest.raises(UserError, match="another base"):
        calibrated = QuantState.load(packed.calibration)
        calibrated.base_sha256 = sha256
        calibrated.save(tmp_path / "quant_state.safetensors")
        state = tmp_path / "quant_state.safetensors"
        export_checkpoint(small.base, tmp_path / "out", adapters=[packed.persona], quant_state=state)
    with pytest.raises(UserError, match="another base"):
        distill(recipe, small.base, plain, packed.calibration, small.train, small.validation, tmp_path / "distill")


def test_all_weights_are_trained_but_the_router_s(small: Small, full: Trained) -> None:
    assert full.sft["loop"]["best"] < full.sft["loop"]["first"]
    assert _held_out_loss(small, full) == full.sft["loop"]["best"]
    before, after = load_file(small.base / "model.safetensors"), load_file(full.persona / "model.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in before.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in after.items()
    }
    for name, tensor in before.items():
        if ".gate." in name:
            assert torch.equal(tensor, after[name]), name
        elif tensor.dim() == 2:
            assert not torch.equal(tensor, after[name]), name
    last = load_file(full.student / "model" / "model.safetensors")
    ends = ("lm_head.weight", "backbone.embeddings.weight")
    assert all(torch.equal(last[name], after[name]) for name in ends)
    assert full.distilled["coverage"]["skipped"]["lm_head.weight"] == 1


def test_all_weights_are_exported_as_they_were_trained(small: Small, full: Trained) -> None:
    base, state = full.student / "model", full.student / "quant_state.safetensors"
    assert QuantState.load(state).adapter is None
    report = export_checkpoint(base, full.folder / "out", quant_state=state)
    assert report.verification.differing_bytes == 0 and report.merged == 0
    student = load_base(base)
    quantize_(student, base, QuantState.load(state))
    _require_served_is_computed(student, full.folder / "out")
    with pytest.raises(UserError, match="another base"):
        export_checkpoint(small.base, full.folder / "other", quant_state=state)
    assert (
        json.loads((base / "qat_model.json").read_text(encoding="utf-8"))["step"] == full.distilled["loop"]["best_step"]
    )
