from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from qat.calibration import calibrate
from qat.errors import UserError
from qat.quant.effective import effective_weight
from qat.quant.nvfp4 import fake_quant_weight
from qat.quant.state import QuantState
from qat.train.adapters import load_adapter
from qat.train.base import base_sha256, load_base, load_tokenizer
from qat.train.batches import encode_file
from qat.train.distill import distill
from qat.train.divergence import measure
from qat.train.persona import load_persona
from qat.train.sft import train_sft, validation_loss
from qat.train.student import quantize_
from tests.unit.train import world
from tests.unit.train.conftest import Small


class Trained(NamedTuple):
    """A persona, its calibration, and a distillation of it."""

    persona: Path
    calibration: Path
    student: Path
    report: dict[str, object]


@pytest.fixture(scope="module")
def trained(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    recipe = world.recipe(
        small.base, sft={"epochs": 1}, distill={"max_steps": 24, "learning_rate": 0.002, "eval_every": 8}
    )
    train_sft(recipe, small.base, small.train, small.validation, root / "sft")
    persona = root / "sft" / "adapter"
    calibrate(recipe, "all", small.base, persona, small.train, root / "calibration")
    state = root / "calibration" / "quant_state.safetensors"
    report = distill(recipe, small.base, persona, state, small.train, small.validation, root / "distill")
    return Trained(persona, state, root / "distill", report.to_json())


def test_divergence_is_what_distillation_reports(small: Small, trained: Trained) -> None:
    """From the files alone, in fresh networks: the persona is at zero, the student exactly where validation left it."""
    recipe = world.recipe(small.base)
    arms = {
        "persona": (None, None),
        "ptq": (None, trained.calibration),
        "qad": (trained.student / "adapter", trained.student / "quant_state.safetensors"),
    }
    found = measure(recipe, small.base, trained.persona, arms, small.validation)
    loop = trained.report["loop"]
    assert isinstance(loop, dict)
    persona, ptq, qad = (found[name].replies for name in arms)
    assert persona.kl == 0.0 and persona.top1 == 1.0
    assert ptq.kl == loop["first"]
    assert qad.kl == loop["best"]
    assert qad.to_json() == trained.report["divergence"]
    assert 0 < qad.kl < ptq.kl
    routers = [found[name].router for name in arms]
    assert all(router is not None and router.tokens == persona.tokens for router in routers)
    layers = [f"model.layers.{layer}.mixer.experts" for layer in (1, 3)]  # the same under adapters
    assert all(router is not None and list(router.layers) == layers for router in routers)
    assert [router.changed > 0 for router in routers if router is not None] == [False, True, True]
    assert found["qad"].to_json() == {**qad.to_json(), "router": routers[2]._asdict()}  # type: ignore[union-attr]
    json.dumps(trained.report, allow_nan=False)


def test_divergence_by_the_slow_way(small: Small, trained: Trained) -> None:
    """Whole logits of single rows, the definition of KL in float64, means over tokens and categories."""
    recipe = world.recipe(small.base)
    sha256 = base_sha256(small.base)
    samples = encode_file(small.validation, load_tokenizer(recipe.base, small.base), 64).samples
    teacher = load_persona(small.base, trained.persona, sha256)
    student = load_persona(small.base, trained.persona, sha256)
    quantize_(student, small.base, QuantState.load(trained.calibration))
    rows: list[tuple[str, float, bool]] = []
    for sample in samples:
        ids = torch.tensor([sample.input_ids], device=teacher.device)
        with torch.no_grad():
            p, q = (torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1) for model in (teacher, student))
        for position, label in enumerate(sample.labels[1:]):
            if label != -100:
                kl = float((p[position].exp() * (p[position] - q[position])).sum())
                rows.append((sample.category, kl, bool(p[position].argmax() == q[position].argmax())))
    found = measure(recipe, small.base, trained.persona, {"ptq": (None, trained.calibration)}, small.validation)[
        "ptq"
    ].replies
    assert found.tokens == len(rows) and found.conversations == len(samples)
    # Activations are bfloat16 and batches round differently, so only a few per cent are asked.
    assert found.kl == pytest.approx(sum(kl for _, kl, _ in rows) / len(rows), rel=0.05)
    assert found.top1 == pytest.approx(sum(same for _, _, same in rows) / len(rows), abs=0.03)
    odd = [kl for category, kl, _ in rows if category == "odd"]
    assert found.categories["odd"].tokens == len(odd)
    assert found.categories["odd"].kl == pytest.approx(sum(odd) / len(odd), rel=0.1)


def test_ranges_cover_every_effective_weight(small: Small, trained: Trained) -> None:
    """The state handed to export never clips: amax >= max |W_persona + s B A|, from the adapter's file."""
    state = QuantState.load(trained.student / "quant_state.safetensors")
    calibrated = QuantState.load(trained.calibration)
    assert set(state.modules) == set(calibrated.modules) and state.adapter == "adapter"
    sha256 = base_sha256(small.base)
    parent = json.loads((trained.student / "adapter" / "qat_adapter.json").read_text(encoding="utf-8"))["parent_sha256"]
    persona = load_persona(small.base, trained.persona, sha256)
    model = load_adapter(persona, trained.student / "adapter", sha256, parent=parent)
    checked = 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer") and not hasattr(module, "parameter_name"):
            key = name.replace("base_model.model.model.", "backbone.")
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            with torch.no_grad():
                weight = effective_weight(module.base_layer.weight, a, b, module.scaling["default"])
            amax = state.modules[key].weight_amax.to(weight.device)
            assert float(weight.abs().max()) <= float(amax)
            assert float(amax) >= float(calibrated.modules[key].weight_amax)
            assert float(fake_quant_weight(weight, amax).abs().max()) <= float(amax) * 1.01
            assert torch.equal(state.modules[key].input_amax, calibrated.modules[key].input_amax)
            checked += 1
    assert checked == 10


def test_ranges_grow_and_are_shared_but_never_shrink(small: Small, trained: Trained) -> None:
    from qat.recipe.schema import AdapterBlock
    from qat.train.adapters import attach_adapter
    from qat.train.ranges import WeightRanges

    model, _ = attach_adapter(
        load_persona(small.base, trained.persona, base_sha256(small.base)),
        AdapterBlock(rank=2, alpha=2.0),
        "nemotron_h",
        0,
    )
    quantize_(model, small.base, QuantState.load(trained.calibration))
    ranges = WeightRanges(model)
    before = ranges.tensors()
    ranges.grow_()
    assert ranges.growth() == (0, 1.0)
    layer = model.get_submodule("base_model.model.model.layers.2.mixer.k_proj")
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(3.0)
    ranges.grow_()
    grown = ranges.tensors()
    weight = layer.base_layer.weight
    with torch.no_grad():
        factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = float(effective_weight(weight, *factors, 1.0).abs().max())
    for name in "qkv":
        assert float(grown[f"backbone.layers.2.mixer.{name}_proj"]) == expected
    assert ranges.growth().modules == 3
    untouched = [name for name in before if "layers.2." not in name]
    assert all(torch.equal(before[name], grown[name]) for name in untouched) and len(untouched) == 10
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    ranges.grow_()
    assert float(ranges.tensors()["backbone.layers.2.mixer.q_proj"]) == expected
    ranges.load_(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in ranges.tensors().items())


def test_a_state_of_another_base(small: Small, trained: Trained, tmp_path: Path) -> None:
    other = world.save_base(tmp_path / "other", seed=1)
    recipe = world.recipe(other)
    with pytest.raises(UserError, match="another base"):
        distill(recipe, other, trained.persona, trained.calibration, small.train, small.validation, tmp_path / "out")
    with pytest.raises(UserError, match="another base"):
        load_persona(other, trained.persona, base_sha256(other))
    assert load_base(other) is not None


def test_going_on_restores_ranges_and_bytes(
    small: Small, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off in the middle by an exception, taken up again: same adapter, same ranges."""
    from qat.train.distill import DistillLoop

    recipe = world.recipe(small.base, distill={"max_steps": 6, "learning_rate": 0.02, "eval_every": 3, "save_every": 2})
    arguments = (recipe, small.base, trained.persona, trained.calibration, small.train, small.validation)
    distill(*arguments, tmp_path / "whole")
    after_step = DistillLoop.after_step

    def stop(self: DistillLoop) -> None:
        after_step(self)
        if self.state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(DistillLoop, "after_step", stop)
    with pytest.raises(KeyboardInterrupt):
        distill(*arguments, tmp_path / "broken")
    monkeypatch.setattr(DistillLoop, "after_step", after_step)
    report = distill(*arguments, tmp_path / "broken")
    assert report.loop.resumed_from == 4
    for name in ("adapter/adapter_model.safetensors", "quant_state.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_plain_quantization_aware_training(
    small: Small, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a teacher; replies that the persona wrote count as rows; the step is chosen by the cross entropy."""
    settings = {"tokens": "replies", "ce_weight": 1.0, "replies": {"count": 3, "max_new_tokens": 4}}
    recipe = world.recipe(small.base, distill={"max_steps": 4, "eval_every": 2, **settings})
    monkeypatch.setattr("qat.train.distill.hidden_of_rows", lambda *_: pytest.fail("the teacher was asked"))
    arguments = (recipe, small.base, trained.persona, trained.calibration, small.train, small.validation)
    report = distill(*arguments, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    entropies = [row["cross_entropy"] for row in log if "cross_entropy" in row]
    assert len(entropies) == 3 and report.loop.best == min(entropies)
    assert (report.replies, report.train.conversations) == (3, 27)
    assert len((tmp_path / "replies.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    sha256 = base_sha256(small.base)
    student = load_adapter(
        load_persona(small.base, trained.persona, sha256),
        tmp_path / "adapter",
        sha256,
        parent=report.persona_sha256,
    )
    quantize_(student, small.base, QuantState.load(tmp_path / "quant_state.safetensors"))
    samples = encode_file(small.validation, load_tokenizer(recipe.base, small.base), 64).samples
    assert validation_loss(student, samples) == report.loop.best


def test_a_mix_of_both_losses(small: Small, trained: Trained, tmp_path: Path) -> None:
    """The first step's loss is the weighted sum of those of the two pure trainings, whose first batch is the same."""
    first = {}
    for ce_weight in (0.0, 0.25, 1.0):
        settings = {"max_steps": 1, "eval_every": 1, "tokens": "replies", "ce_weight": ce_weight}
        recipe = world.recipe(small.base, distill=settings)
        arguments = (recipe, small.base, trained.persona, trained.calibration, small.train, small.validation)
        distill(*arguments, tmp_path / str(ce_weight))
        log = [json.loads(line) for line in (tmp_path / str(ce_weight) / "log.jsonl").read_text().splitlines()]
        first[ce_weight] = next(row["loss"] for row in log if "loss" in row)
    assert first[0.25] == pytest.approx(0.75 * first[0.0] + 0.25 * first[1.0], rel=1e-3)
    assert first[0.0] < first[1.0]


def test_answers_in_a_file_give_the_same_bytes(
    small: Small, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = world.recipe(small.base, distill={"max_steps": 2, "eval_every": 2})
    arguments = (recipe, small.base, trained.persona, trained.calibration, small.train, small.validation)
    inside = distill(*arguments, tmp_path / "inside")
    mapped: list[int] = []
    from_file = torch.from_file
    monkeypatch.setattr("qat.train.compare.KEPT_IN_MEMORY", 0)
    monkeypatch.setattr(
        "torch.from_file", lambda *given, **named: mapped.append(named["size"]) or from_file(*given, **named)
    )
    outside = distill(*arguments, tmp_path / "outside")
    assert mapped and not (tmp_path / "outside" / "teacher.bin").exists()
    assert inside.adapter_sha256 == outside.adapter_sha256 and inside.divergence == outside.divergence


def test_a_thin_mask_is_refused_in_distillation_too(
    small: Small, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh prompts are other rows than those of fine-tuning; `tokens: all` has no mask."""
    monkeypatch.setattr("qat.train.before.LEAST_TRAINED_SHARE", 0.99)
    recipe = world.recipe(small.base, distill={"tokens": "replies"})
    files = small.base, trained.persona, trained.calibration, small.train, small.validation
    with pytest.raises(UserError, match="would be trained on"):
        distill(recipe, *files, tmp_path)


def test_arms_are_measured_with_one_network_in_memory(
    small: Small, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a 30B model two do not fit beside each other: each is gone, circles and all, when the next is loaded."""
    networks: list[weakref.ref[torch.nn.Module]] = []
    alive: list[int] = []

    def watched(*arguments: Any) -> Any:
        alive.append(sum(network() is not None for network in networks))
        model = load_persona(*arguments)
        model.held = [model]  # in a circle, as replaced forwards hold it on a GPU
        networks.append(weakref.ref(model))
        return model

    monkeypatch.setattr("qat.train.divergence.load_persona", watched)
    student = trained.student / "adapter", trained.student / "quant_state.safetensors"
    arms = {"qad": student, "ptq": (None, trained.calibration), "again": student}
    gc.disable()  # when Python collects by itself is luck
    try:
        measure(world.recipe(small.base), small.base, trained.persona, arms, small.validation)
    finally:
        gc.enable()
    assert alive == [0, 0, 0]
