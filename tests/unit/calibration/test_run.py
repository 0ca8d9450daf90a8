from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch

from qat.calibration import calibrate
from qat.calibration.coverage import TOO_FEW_TOKENS
from qat.calibration.samples import choose_samples
from qat.errors import UserError
from qat.quant.state import QuantState
from qat.recipe.schema import AdapterBlock
from qat.train.adapters import attach_adapter, save_adapter
from qat.train.base import base_sha256, load_base, load_tokenizer
from qat.train.batches import Sample, encode_file
from qat.train.persona import load_persona
from tests.unit.train import world


class Given:
    """A base, an adapter with factors that matter, and conversations."""

    def __init__(self, root: Path) -> None:
        self.base = world.save_base(root / "base")
        self.train = world.save_conversations(root / "train.jsonl", 30, seed=1)
        self.recipe = world.recipe(self.base)
        self.sha256 = base_sha256(self.base)
        self.adapter = root / "adapter"
        model, _ = attach_adapter(load_base(self.base), AdapterBlock(rank=4, alpha=8.0), "nemotron_h", 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
        save_adapter(model, self.adapter, self.sha256)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("calibration"))


def test_ranges_are_the_maxima_of_what_passed(given: Given, tmp_path: Path) -> None:
    """Oracle: plain hooks on the unquantized persona, one conversation at a time.

    Calibration runs unquantized too, so inputs agree up to the rounding of other batch shapes; weights agree exactly.
    """
    report = calibrate(given.recipe, "all", given.base, given.adapter, given.train, tmp_path)
    state = QuantState.load(tmp_path / "quant_state.safetensors")
    persona = load_persona(given.base, given.adapter, given.sha256)
    seen: dict[str, float] = {}
    routed: dict[str, list[int]] = {}

    def linear_hook(name: str) -> object:
        def hook(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            seen[name] = max(seen.get(name, 0.0), float(arguments[0].abs().max()))

        return hook

    def router_hook(name: str) -> object:
        def hook(_: torch.nn.Module, __: object, output: tuple[torch.Tensor, ...]) -> None:
            counts = routed.setdefault(name, [0] * 8)
            for expert in output[2].flatten().tolist():
                counts[expert] += 1

        return hook

    for name, module in persona.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(linear_hook(name))  # type: ignore[arg-type]
        elif name.endswith(".gate"):
            module.register_forward_hook(router_hook(name))  # type: ignore[arg-type]
        elif name.endswith(".experts"):
            module.register_forward_pre_hook(linear_hook(f"{name}.up_proj"))  # type: ignore[arg-type]
    samples = encode_file(given.train, load_tokenizer(given.recipe.base, given.base), 64).samples
    lengths = [len(sample.input_ids) for sample in samples]
    chosen = choose_samples([sample.category for sample in samples], lengths, 8, given.recipe.seed)
    with torch.no_grad():
        for row in chosen:
            persona(input_ids=torch.tensor([samples[row].input_ids]))
    groups = {name: group for group in report.groups for name in group}
    assert set(groups) == {f"backbone.layers.2.mixer.{name}_proj" for name in "qkv"}
    for name, ranges in state.modules.items():
        members = groups.get(name, [name])
        memory = [member.replace("backbone.", "model.") for member in members]
        if not name.endswith("experts.down_proj"):
            assert float(ranges.input_amax) == pytest.approx(max(seen[member] for member in memory), rel=0.02)
        if ".experts." in name:
            expected = persona.get_parameter(memory[0]).abs().amax(dim=(1, 2)).float()
            assert torch.equal(ranges.weight_amax, expected)
        else:
            assert float(ranges.weight_amax) == max(
                float(persona.get_submodule(member).weight.abs().max()) for member in memory
            )
    assert report.tokens == sum(lengths[row] for row in chosen) and sum(report.conversations.values()) == 8
    for layer in report.experts:
        counts = routed[layer.layer.replace(".experts", ".gate")]
        # A token on the edge between two experts may fall to the other one in another batch shape.
        assert sum(layer.tokens) == sum(counts) == 2 * report.tokens
        assert all(abs(own - other) <= 2 for own, other in zip(layer.tokens, counts, strict=True))
        assert layer.starved == {expert: count for expert, count in enumerate(layer.tokens) if count < TOO_FEW_TOKENS}
    json.dumps(report.to_json(), allow_nan=False)


def test_the_same_bytes_every_time(given: Given, tmp_path: Path) -> None:
    for name in ("one", "two"):
        calibrate(given.recipe, "nvidia-nano", given.base, given.adapter, given.train, tmp_path / name)
    one, two = ((tmp_path / name / "quant_state.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    state = QuantState.load(tmp_path / "one" / "quant_state.safetensors")
    assert state.preset == "nvidia-nano" and state.base_sha256 == given.sha256
    assert not any("q_proj" in name for name in state.modules)


def test_the_algorithm_of_the_recipe(given: Given, tmp_path: Path) -> None:
    """`mse` reads everything twice and counts it once; its ranges are its own."""
    reports = {}
    for name in ("max", "mse"):
        changed = given.recipe.quant.calibration.model_copy(update={"algorithm": name})
        recipe = given.recipe.model_copy(
            update={"quant": given.recipe.quant.model_copy(update={"calibration": changed})}
        )
        reports[name] = calibrate(recipe, "all", given.base, given.adapter, given.train, tmp_path / name)
    one, two = reports.values()
    assert (one.algorithm, two.algorithm) == ("max", "mse")
    assert one.experts == two.experts and one.tokens == two.tokens and one.formats == {"nvfp4": 14}
    assert (one.remedy is None) == (not one.starved) and one.to_json()["remedy"] == one.remedy
    states = [QuantState.load(tmp_path / name / "quant_state.safetensors").modules for name in reports]
    assert any(not torch.equal(state.input_amax, states[1][name].input_amax) for name, state in states[0].items())  # type: ignore[arg-type]


def test_an_unknown_preset(given: Given, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="preset"):
        calibrate(given.recipe, "everything", given.base, given.adapter, given.train, tmp_path)


def test_the_forward_loop_keeps_nothing() -> None:
    """Before a batch goes in, what the one before gave is gone: memory does not grow with the conversations."""
    from qat.calibration.run import _read

    alive: list[weakref.ref[torch.Tensor]] = []
    shapes: list[tuple[int, ...]] = []

    class Network(torch.nn.Linear):
        def base_model(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            assert not use_cache and not torch.is_grad_enabled() and not self.training
            assert [reference() for reference in alive] == [None] * len(alive)
            output = torch.ones(*input_ids.shape, 4)
            alive.append(weakref.ref(output))
            shapes.append(tuple(input_ids.shape))
            return output

    samples = [Sample(str(row), "x", [1] * length, [1] * length) for row, length in enumerate([3, 5, 5])]
    _read(Network(2, 2).train(), samples, [[1, 2], [0]], "test")
    assert shapes == [(2, 5), (1, 3)]
