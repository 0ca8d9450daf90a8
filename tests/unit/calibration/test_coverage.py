from __future__ import annotations

import torch

from qat.calibration.coverage import ExpertTokens, count_expert_tokens, remedy
from tests.tiny_models import nemotron_h_tiny, qwen3_tiny, token_ids


def test_counts_are_the_routers() -> None:
    model = nemotron_h_tiny()
    seen: list[torch.Tensor] = []
    gate = model.get_submodule("model.layers.1.mixer.gate")
    gate.register_forward_hook(lambda module, arguments, output: seen.append(output[2]))
    with count_expert_tokens(model) as found, torch.no_grad():
        for seed in (1, 2):
            model(input_ids=token_ids(seed=seed))
    first = next(layer for layer in found if layer.layer == "model.layers.1.mixer.experts")
    chosen = torch.cat([index.flatten() for index in seen]).tolist()
    assert first.tokens == [chosen.count(expert) for expert in range(8)] and sum(first.tokens) == 2 * 2 * 80
    with torch.no_grad():
        model(input_ids=token_ids())
    assert sum(first.tokens) == 2 * 2 * 80  # the hooks are gone
    with count_expert_tokens(qwen3_tiny()) as none:
        pass
    assert none == []


def test_remedies_by_hand() -> None:
    fed = ExpertTokens("a", [40, 32, 100])
    hungry = ExpertTokens("b", [8, 31, 100])
    unreached = ExpertTokens("c", [0, 0, 50])
    assert remedy([fed], 10, 100) is None
    # The rarest saw 8 tokens in 10 conversations, so 32 take four times as many.
    assert remedy([fed, hungry], 10, 100) == "Set quant.calibration.samples to about 40 (now 10)."
    said = remedy([hungry], 10, 30)
    assert said is not None and "About 40 conversations" in said and "there are 30" in said
    said = remedy([hungry, unreached], 10, 100)
    assert said is not None and said.startswith("2 experts were never reached") and "about 40" in said
    assert remedy([unreached], 10, 100) == "2 experts were never reached: add conversations of other kinds."
