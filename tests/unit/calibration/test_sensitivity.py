"""Sensitivity of groups against networks with quantizers in one group alone, and whole logits."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.calibration import calibrate
from qat.calibration.sensitivity import EVERYTHING, Sensitivity, choose_preset, measure
from qat.errors import UserError
from qat.quant.modelopt import insert_quantizers, quantizers
from qat.quant.presets import Preset, preset_of
from qat.quant.state import QuantState
from qat.recipe.schema import PresetBlock, Recipe
from qat.train.base import load_tokenizer
from qat.train.batches import encode_file
from qat.train.persona import load_persona
from qat.train.student import quantize_
from tests.unit.calibration.test_run import Given
from tests.unit.train import world

GROUP = "3.experts"


class Measured:
    """A base with an adapter, its sensitivity in two formats, and how many networks were alive at each loading."""

    def __init__(self, root: Path) -> None:
        self.given = Given(root)
        self.held_out = world.save_conversations(root / "held_out.jsonl", 12, seed=9)
        self.alive: list[int] = []
        self._networks: list[weakref.ref[torch.nn.Module]] = []
        gc.disable()  # when Python collects by itself is luck
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("qat.calibration.sensitivity.load_persona", self._load)
                self.found = measure(
                    self.given.recipe,
                    self.given.base,
                    self.given.adapter,
                    self.given.train,
                    self.held_out,
                    formats=("nvfp4", "fp8"),
                    conversations=100,
                )
        finally:
            gc.enable()

    def _load(self, *arguments: Any) -> Any:
        self.alive.append(sum(network() is not None for network in self._networks))
        model = load_persona(*arguments)
        model.held = [model]  # in a circle, as replaced forwards hold it on a GPU
        self._networks.append(weakref.ref(model))
        return model


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(tmp_path_factory.mktemp("sensitivity"))


def slow_kl(measured: Measured, preset: Preset, state: QuantState) -> float:
    """Quantizers only where the preset says, single rows, whole logits, the definition of KL in float64."""
    given = measured.given
    samples = encode_file(measured.held_out, load_tokenizer(given.recipe.base, given.base), 64).samples
    teacher = load_persona(given.base, given.adapter, given.sha256)
    student = load_persona(given.base, given.adapter, given.sha256)
    insert_quantizers(student, preset, json.loads((given.base / "config.json").read_text()))
    for name, pair in quantizers(student).items():
        for operand, quantizer in pair.used().items():
            quantizer.register_buffer("_amax", getattr(state.modules[name], f"{operand}_amax").clone())
    total, tokens = 0.0, 0
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        with torch.no_grad():
            p, q = (torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1) for model in (teacher, student))
        for position, label in enumerate(sample.labels[1:]):
            if label != -100:
                total += float((p[position].exp() * (p[position] - q[position])).sum())
                tokens += 1
    assert tokens == measured.found.tokens and len(samples) == measured.found.conversations
    return total / tokens


def test_one_network_at_a_time(measured: Measured) -> None:
    """Of a 30B model two do not fit into memory beside each other."""
    assert measured.alive == [0, 0]


def test_one_group_alone(measured: Measured, tmp_path: Path) -> None:
    given, found = measured.given, measured.found
    calibrate(given.recipe, "all", given.base, given.adapter, given.train, tmp_path)
    state = QuantState.load(tmp_path / "quant_state.safetensors")
    score = next(score for score in found.groups if score.group == GROUP and score.format == "nvfp4")
    alone = Preset("alone", dict.fromkeys(score.modules, "nvfp4"))
    # Activations are bfloat16 and batches round differently, so only a few per cent are asked.
    assert score.kl == pytest.approx(slow_kl(measured, alone, state), rel=0.06)
    everything = next(score for score in found.kinds if score.group == EVERYTHING and score.format == "nvfp4")
    assert everything.kl == pytest.approx(slow_kl(measured, Preset("all"), state), rel=0.06)
    assert everything.kl > score.kl > 0


def test_rows(measured: Measured) -> None:
    found = measured.found
    by_format = {kind: [score for score in found.groups if score.format == kind] for kind in ("nvfp4", "fp8")}
    assert [score.group for score in by_format["nvfp4"]] == [
        "0.mamba.in_proj", "0.mamba.out_proj", "1.experts", "1.shared_experts", "2.attention", "3.experts",
        "3.shared_experts",
    ]  # fmt: skip
    assert not any("experts" in score.group.split(".") for score in by_format["fp8"])  # no FP8 for routed experts
    assert len(by_format["fp8"]) == 5
    four = {score.group: score.kl for score in by_format["nvfp4"]}
    assert all(score.kl < four[score.group] for score in by_format["fp8"])  # eight bits cost less than four
    assert all(0 <= score.top1 <= 1 and score.kl_se is not None for score in [*found.groups, *found.kinds])
    again = Sensitivity.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert again == found


def test_a_chosen_preset_is_exported_within_its_budget(measured: Measured, tmp_path: Path) -> None:
    """From the measurement to a checkpoint: the preset in a recipe, its calibration, its export, its size."""
    from qat.export import export_checkpoint
    from qat.export.doctor import diagnose

    given, found = measured.given, measured.found
    whole = found.fixed_bytes + sum({score.group: score.bytes_bf16 for score in found.groups}.values())
    smallest = found.fixed_bytes + sum({s.group: s.bytes for s in found.groups if s.format == "nvfp4"}.values())
    budget = (whole + smallest) // 2
    choice, lists = choose_preset(found, budget)
    assert smallest < choice.bytes <= budget and choice.exact
    assert set(choice.formats.values()) == {"bf16", "nvfp4", "fp8"} and set(lists) == {"bf16", "fp8"}
    content = given.recipe.model_dump(mode="json")
    content["quant"]["presets"] = {"mine": {"like": "all", **lists}}
    recipe = Recipe.model_validate(content)
    config = json.loads((given.base / "config.json").read_text())
    preset = preset_of("mine", {"mine": PresetBlock.model_validate({"like": "all", **lists})}, config)
    calibrate(recipe, "mine", given.base, given.adapter, given.train, tmp_path / "calibration")
    path = tmp_path / "calibration" / "quant_state.safetensors"
    state = QuantState.load(path)
    assert {name: module.format for name, module in state.modules.items()} == preset.formats(config)
    report = export_checkpoint(given.base, tmp_path / "out", adapters=[given.adapter], quant_state=path)
    assert report.bytes == choice.bytes and report.verification.differing_bytes == 0
    assert set(report.precisions) >= {"NVFP4", "FP8", "BF16"}
    assert [str(finding) for finding in diagnose(tmp_path / "out").findings if finding.severity != "note"] == []
    model = load_persona(given.base, given.adapter, given.sha256)
    inserted = quantize_(model, given.base, state)
    assert set(inserted.quantized) == set(state.modules)
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=torch.arange(40).view(1, -1)).logits).all())


def test_formats_that_cannot_be(measured: Measured) -> None:
    given = measured.given
    for formats in (("int4",), ("fp8",)):
        with pytest.raises(UserError, match="format"):
            measure(given.recipe, given.base, given.adapter, given.train, measured.held_out, formats=formats)
    with pytest.raises(UserError, match="at least"):
        choose_preset(measured.found, 1000)
