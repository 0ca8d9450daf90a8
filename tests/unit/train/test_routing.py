"""Changed expert choices against sets compared token by token."""

from __future__ import annotations

import torch

from qat.quant.modelopt import calibrate, insert_quantizers, quantizers_off
from qat.train.routing import compare_choices, record_choices
from tests.tiny_models import nemotron_h_tiny, qwen3_tiny, token_ids


def test_by_hand() -> None:
    persona = {"a": [torch.tensor([[1, 2], [3, 4]])], "b": [torch.tensor([[0, 1], [0, 1]])]}
    arm = {"a": [torch.tensor([[2, 1], [3, 7]])], "b": [torch.tensor([[5, 6], [0, 1]])]}
    everywhere = compare_choices(persona, arm, [torch.tensor([True, True])])
    # Order within a token does not count: it changes nothing in a sum.
    assert everywhere == (3 / 8, {"a": 1 / 4, "b": 2 / 4}, 2)
    second = compare_choices(persona, arm, [torch.tensor([False, True])])
    assert second == (1 / 4, {"a": 1 / 2, "b": 0.0}, 1)
    assert compare_choices({}, {}, []) is None


def test_a_quantized_network_token_by_token() -> None:
    model = nemotron_h_tiny()
    seen: dict[str, list[list[int]]] = {}

    def watch(name: str) -> None:
        gate = model.get_submodule(f"{name}.gate")
        gate.register_forward_hook(
            lambda module, arguments, output: seen.setdefault(name, []).extend(output[2].tolist())
        )

    for layer in (1, 3):
        watch(f"model.layers.{layer}.mixer")
    insert_quantizers(model, "all", model.config.to_dict())
    calibrate(model, lambda network: network(input_ids=token_ids()))
    batches = [token_ids(seed=seed) for seed in (5, 6)]
    counted = [torch.rand(80, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in (1, 2)]
    records = []
    for switch in (True, False):
        seen.clear()
        with record_choices(model) as choices, torch.no_grad():
            for ids in batches:
                if switch:
                    with quantizers_off(model):
                        model(input_ids=ids)
                else:
                    model(input_ids=ids)
        records.append((choices, {name: list(rows) for name, rows in seen.items()}))
    (persona, expected), (arm, found) = records
    stability = compare_choices(persona, arm, counted)
    assert stability is not None and 0 < stability.changed < 1
    mask = torch.cat(counted).tolist()
    assert stability.tokens == sum(mask)
    for name, rows in expected.items():
        changed = total = 0
        for own, others, counts in zip(rows, found[name], mask, strict=True):
            if counts:
                changed += len(set(others) - set(own))
                total += len(others)
        assert stability.layers[f"{name}.experts"] == changed / total
    # What reaches the first router has passed one quantized layer, what reaches the second three.
    assert stability.layers["model.layers.1.mixer.experts"] < stability.layers["model.layers.3.mixer.experts"]
    assert compare_choices(persona, persona, counted).changed == 0  # type: ignore[union-attr]


def test_a_dense_network_has_no_router() -> None:
    model = qwen3_tiny()
    with record_choices(model) as choices, torch.no_grad():
        model(input_ids=token_ids())
    assert choices == {}
