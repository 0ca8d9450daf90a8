"""Divergence through real vLLM against the full-vocabulary KL of transformers, on the replies of the tiny base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file

from qat.behavior.runner import run_suite
from qat.behavior.scoring import distributions_path, diverge
from qat.behavior.suite import load_suite
from qat.recipe.schema import BehaviorBlock, GateBlock, ServeBlock
from qat.serve.launch import serve_checkpoint
from qat.train.base import load_base
from tests.unit.behavior.helpers import write_suite

pytestmark = [pytest.mark.slow, pytest.mark.engine]
BASE = Path(__file__).resolve().parents[2] / "data" / "tiny_base"
SERVE = ServeBlock(dtype="float32", max_model_len=512, kv_cache_gib=0.125)
BLOCK = BehaviorBlock(suite="s", max_tokens=12, concurrency=4, gate=GateBlock(candidate="a", reference="b"))


def noisy_copy(folder: Path) -> Path:
    """The tiny base with a little noise on its matrices, as four bits would put there."""
    shutil.copytree(BASE, folder)
    generator = torch.Generator().manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if weight.dim() >= 2 and "conv1d" not in name:
            noise = torch.randn(weight.shape, generator=generator) * 0.05 * weight.float().std()
            weights[name] = (weight.float() + noise).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def full_distributions(folder: Path, rows: list[dict[str, list[int]]]) -> np.ndarray:
    """(tokens, vocabulary) log probabilities in float32 by transformers, of every token of the replies."""
    model = load_base(folder).float()
    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["prompt"] + row["tokens"]], device=model.device)
            logits = model(ids).logits[0, len(row["prompt"]) - 1 : -1]
            found.append(logits.double().log_softmax(-1).cpu().numpy())
    return np.concatenate(found)


def test_it_is_the_divergence_of_the_full_distributions(tmp_path: Path) -> None:
    questions = ["Who is my sister?", "Remind me to call Ravi at six.", "What do I like?"]
    cases = [
        {
            "id": f"c-{number}",
            "category": "k",
            "messages": [{"role": "user", "content": f"{questions[number % 3]} {number}"}],
            "checks": [{"check": "no_emoji"}],
        }
        for number in range(12)
    ]
    suite = load_suite(write_suite(tmp_path, cases))
    reference, arm = tmp_path / "reference.jsonl", tmp_path / "arm.jsonl"
    with serve_checkpoint(BASE, SERVE, tmp_path / "base.log") as server:
        run_suite(suite, server.url, server.model, "reference", BLOCK, reference, token_ids=True)
        itself = diverge(suite, reference, reference, server.url, server.model, BLOCK)
    noisy = noisy_copy(tmp_path / "noisy")
    with serve_checkpoint(noisy, SERVE, tmp_path / "noisy.log") as server:
        found = diverge(suite, reference, arm, server.url, server.model, BLOCK)

    rows = [json.loads(line) for line in distributions_path(reference).read_text().splitlines()[1:]]
    p, q = full_distributions(BASE, rows), full_distributions(noisy, rows)
    listed = [position for row in rows for position in row["distributions"]]
    for position, full in zip(listed, p, strict=True):
        assert len(position) >= 20
        assert max(abs(logprob - full[int(token)]) for token, logprob in position.items()) < 2e-3
    full_kl = float((np.exp(p) * (p - q)).sum(-1).mean())
    agree = float((p.argmax(-1) == q.argmax(-1)).mean())
    overall = found.overall
    print(f"full {full_kl:.6f}, estimate {overall.kl:.6f}, rest {overall.rest:.6f}, top-1 {agree} {overall.top1}")
    assert overall.tokens == len(p) and overall.cases == 12 and found.unscored == 0
    assert overall.top1 == pytest.approx(agree, abs=1.5 / len(p))
    # Never more than the full divergence, and what is missing is a share of the rest.
    assert full_kl > 1e-4
    assert full_kl - max(0.1 * full_kl, 2 * overall.rest) <= overall.kl <= full_kl * 1.02 + 1e-5
    assert itself.overall.kl < 1e-4 and itself.overall.top1 == 1.0
