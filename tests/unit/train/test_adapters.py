from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from qat.errors import UserError
from qat.recipe.schema import AdapterBlock
from qat.train.adapters import (
    SIDECAR,
    attach_adapter,
    find_targets,
    load_adapter,
    save_adapter,
    use_effective_weights_,
)
from tests.tiny_models import nemotron_h_tiny, qwen3_moe_tiny, qwen3_tiny, token_ids

BLOCK = AdapterBlock(rank=4, alpha=8.0)


def _adapted(seed: int = 0) -> PeftModel:
    model, _ = attach_adapter(nemotron_h_tiny(), BLOCK, "nemotron_h", seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def test_coverage_of_every_kind() -> None:
    """Counted by hand: one Mamba layer, one attention layer, two layers of experts with a shared one each."""
    model, coverage = attach_adapter(nemotron_h_tiny(), BLOCK, "nemotron_h", 0)
    assert coverage.matched == {"attention": 4, "mamba": 2, "routed_experts": 4, "shared_experts": 4}
    assert coverage.skipped == {"lm_head": 1}
    assert coverage.router_frozen == 2
    rank, hidden, experts, inner, shared, mamba = 4, 64, 8, 48, 96, 4 * 32
    in_proj = 2 * mamba + 2 * 2 * 16 + 4
    linears = [(hidden, 64), (hidden, 32), (hidden, 32), (64, hidden), (hidden, in_proj), (mamba, hidden)]
    linears += 2 * [(hidden, shared), (shared, hidden)]
    fused = 4 * experts * rank * (hidden + inner)
    assert coverage.trainable == rank * sum(sum(shape) for shape in linears) + fused
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_experts_alone_bring_nothing_else() -> None:
    """With target_modules left out PEFT would add attention by itself."""
    model, coverage = attach_adapter(
        nemotron_h_tiny(), BLOCK.model_copy(update={"targets": ("routed_experts",)}), "nemotron_h", 0
    )
    assert coverage.matched == {"routed_experts": 4}
    assert all(".experts." in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("family", "build", "kinds", "matched"),
    [
        ("qwen", qwen3_tiny, ("attention", "mlp"), {"attention": 8, "mlp": 6}),
        ("qwen", qwen3_moe_tiny, ("attention", "routed_experts"), {"attention": 8, "routed_experts": 4}),
        ("llama", qwen3_tiny, ("attention", "mlp"), {"attention": 8, "mlp": 6}),
    ],
)
def test_other_families(family: str, build: object, kinds: tuple[str, ...], matched: dict[str, int]) -> None:
    assert callable(build)
    _, coverage = attach_adapter(build(), BLOCK.model_copy(update={"targets": kinds}), family, 0)
    assert coverage.matched == matched


def test_a_target_that_matches_nothing() -> None:
    with pytest.raises(UserError) as caught:
        find_targets(qwen3_tiny(), "qwen", ("attention", "routed_experts"))
    assert caught.value.value == "routed_experts"
    assert "attention" in caught.value.remedy and "mlp" in caught.value.remedy


def test_a_target_that_the_family_does_not_have() -> None:
    with pytest.raises(UserError, match="no such layers"):
        find_targets(qwen3_tiny(), "llama", ("mamba",))


def test_fresh_factors_change_nothing_and_follow_the_seed() -> None:
    ids = token_ids()
    with torch.no_grad():
        before = nemotron_h_tiny()(input_ids=ids).logits
        model, _ = attach_adapter(nemotron_h_tiny(), BLOCK, "nemotron_h", 3)
        use_effective_weights_(model)
        assert torch.equal(before, model(input_ids=ids).logits)
    again, _ = attach_adapter(nemotron_h_tiny(), BLOCK, "nemotron_h", 3)
    other, _ = attach_adapter(nemotron_h_tiny(), BLOCK, "nemotron_h", 4)
    name = "base_model.model.model.layers.0.mixer.in_proj.lora_A.default.weight"
    assert torch.equal(model.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(model.get_parameter(name), other.get_parameter(name))


def test_the_forward_is_that_of_the_merged_weights() -> None:
    """Oracle: every weight of a plain model replaced by addmm (baddbmm per expert) of the cast factors, written out."""
    model, ids = _adapted(), token_ids()
    use_effective_weights_(model)
    plain = nemotron_h_tiny()
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_A" not in name:
                continue
            path = name.removeprefix("base_model.model.").split(".lora_A")[0]
            a, b = tensor.bfloat16(), model.get_parameter(name.replace("lora_A", "lora_B")).bfloat16()
            if ".experts" in path:
                # PEFT nests the two parameters: the outer wrapper holds down_proj, the inner one up_proj.
                parameter = path.replace(".base_layer", "") + (".up_proj" if "base_layer" in path else ".down_proj")
                weight = parameters[parameter]
                for expert in range(8):
                    own = a[4 * expert : 4 * expert + 4], b[:, expert::8].contiguous()
                    weight[expert] = torch.baddbmm(weight[expert][None], own[1][None], own[0][None], alpha=2.0)[0]
            else:
                weight = parameters[f"{path}.weight"]
                weight.copy_(torch.addmm(weight, b, a, alpha=2.0))
        expected = plain(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert not torch.equal(nemotron_h_tiny()(input_ids=ids).logits, expected)


def test_dropout_has_no_effective_weight() -> None:
    block = AdapterBlock(rank=4, alpha=8.0, dropout=0.1, targets=("attention",))
    model, _ = attach_adapter(nemotron_h_tiny(), block, "nemotron_h", 0)
    with pytest.raises(ValueError, match="dropout"):
        use_effective_weights_(model)


def test_saved_and_loaded_gives_the_same_logits(tmp_path: Path) -> None:
    model, ids = _adapted(), token_ids()
    save_adapter(model, tmp_path / "adapter", "base-hash", stage="sft")
    loaded = load_adapter(nemotron_h_tiny(), tmp_path / "adapter", "base-hash")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
    # Any PEFT program can read it too.
    foreign = PeftModel.from_pretrained(nemotron_h_tiny(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, foreign(input_ids=ids).logits)
    save_adapter(model, tmp_path / "again", "base-hash", stage="sft")
    names = ("adapter_model.safetensors", SIDECAR)
    assert all((tmp_path / "adapter" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


_OF_KIND = {
    "attention": [f"layers.2.mixer.{leaf}_proj" for leaf in "qkvo"],
    "mamba": ["layers.0.mixer.in_proj", "layers.0.mixer.out_proj"],
    "routed_experts": [f"layers.{n}.mixer.experts.{leaf}_proj" for n in (1, 3) for leaf in ("up", "down")],
    "shared_experts": [f"layers.{n}.mixer.shared_experts.{leaf}_proj" for n in (1, 3) for leaf in ("up", "down")],
}


@pytest.mark.parametrize("kind", _OF_KIND)
def test_every_kind_loads_with_plain_peft_and_merges_to_one_rounding(kind: str, tmp_path: Path) -> None:
    """By hand from the file's own tensors: W + s B A in one addmm or baddbmm; all other weights are left alone."""
    from safetensors.torch import load_file

    from qat.quant.lora import merge_adapter_

    block = BLOCK.model_copy(update={"targets": (kind,)})
    model, _ = attach_adapter(nemotron_h_tiny(), block, "nemotron_h", 0)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(index))
    save_adapter(model, tmp_path / "adapter", "h")
    merged = merge_adapter_(PeftModel.from_pretrained(nemotron_h_tiny(), tmp_path / "adapter"))
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base, found = dict(nemotron_h_tiny().named_parameters()), dict(merged.named_parameters())
    assert base.keys() == found.keys()
    changed = {name for name in base if not torch.equal(base[name], found[name])}
    assert changed == {f"model.{path}" + ("" if kind == "routed_experts" else ".weight") for path in _OF_KIND[kind]}
    for path in _OF_KIND[kind]:
        fused = kind == "routed_experts"
        # Of two adapted parameters of one module PEFT nests the first one below the other.
        key = path.rpartition(".")[0] + (".base_layer" if path.endswith("up_proj") else "") if fused else path
        a, b = (factors[f"base_model.model.model.{key}.lora_{side}.weight"].bfloat16() for side in "AB")
        if fused:
            a, b = a.view(8, 4, -1), b.view(b.shape[0], 4, 8).permute(2, 0, 1).contiguous()
            expected = torch.baddbmm(base[f"model.{path}"], b, a, alpha=2.0)
            assert torch.equal(found[f"model.{path}"], expected)
        else:
            assert torch.equal(
                found[f"model.{path}.weight"], torch.addmm(base[f"model.{path}.weight"], b, a, alpha=2.0)
            )


def test_an_adapter_that_reaches_less_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT leaves one weight out, as it did with out_proj: that is an error and never a smaller adapter."""
    from qat.train import adapters

    reached = adapters.adapted_weights

    def fewer(model: PeftModel) -> dict[str, torch.nn.Module]:
        return {name: layer for name, layer in reached(model).items() if not name.endswith("0.mixer.out_proj")}

    monkeypatch.setattr(adapters, "adapted_weights", fewer)
    with pytest.raises(RuntimeError, match=r"missing \['model.layers.0.mixer.out_proj'\]"):
        attach_adapter(nemotron_h_tiny(), BLOCK, "nemotron_h", 0)


def test_an_adapter_of_another_base_or_persona(tmp_path: Path) -> None:
    save_adapter(_adapted(), tmp_path / "adapter", "base-hash", parent_sha256="persona")
    with pytest.raises(UserError, match="another base"):
        load_adapter(nemotron_h_tiny(), tmp_path / "adapter", "other-hash", parent="persona")
    with pytest.raises(UserError, match="another persona"):
        load_adapter(nemotron_h_tiny(), tmp_path / "adapter", "base-hash")
    (tmp_path / "adapter" / SIDECAR).unlink()
    with pytest.raises(UserError, match="does not say which base"):
        load_adapter(nemotron_h_tiny(), tmp_path / "adapter", "base-hash")


def test_a_damaged_adapter(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_adapter(_adapted(), tmp_path / "adapter", "h")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
    with pytest.raises(UserError, match="does not fit the base"):
        load_adapter(nemotron_h_tiny(), tmp_path / "adapter", "h")
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_adapter(nemotron_h_tiny(), tmp_path / "adapter", "h")
    assert json.loads((tmp_path / "adapter" / SIDECAR).read_text(encoding="utf-8"))["base_sha256"] == "h"


@pytest.mark.parametrize(
    "content", [None, "{", '{"peft_type": "SOUP"}', '{"peft_type": "IA3", "target_modules": ["q_proj"]}']
)
def test_an_adapter_with_another_configuration(tmp_path: Path, content: str | None) -> None:
    save_adapter(_adapted(), tmp_path / "adapter", "h")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.unlink() if content is None else config.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="no LoRA" if content and "IA3" in content else "configuration cannot be read"):
        load_adapter(nemotron_h_tiny(), tmp_path / "adapter", "h")


def test_a_kind_that_is_found_in_part() -> None:
    """A library that fuses q, k and v leaves o_proj alone to be found: less than the configuration describes."""
    model = qwen3_tiny()
    for layer in model.model.layers:
        layer.self_attn.qkv_proj = layer.self_attn.q_proj
        del layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
    with pytest.raises(UserError, match="reaches 2 of 8 weights") as caught:
        find_targets(model, "qwen", ("mlp", "attention"))
    assert caught.value.value == "attention" and caught.value.where == "model.layers.0.self_attn.k_proj"


def test_targets_on_the_published_nano(real_data: Path, tmp_path: Path) -> None:
    """Counted by hand in its pattern: 6 attention, 23 Mamba and 23 expert layers; nothing has memory here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    published = real_data / "model_configs" / "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16_config.json"
    config = json.loads(published.read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.bfloat16)
    counts = {kind: len(names) for kind, names in find_targets(model, "nemotron_h", AdapterBlock().targets).items()}
    assert counts == {"attention": 4 * 6, "mamba": 2 * 23, "routed_experts": 2 * 23, "shared_experts": 2 * 23}
