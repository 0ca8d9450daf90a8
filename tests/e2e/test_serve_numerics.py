"""Trained = exported = served: real vLLM unpacks and computes what the fake-quant forward did."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from qat.serve import engine  # noqa: E402
from tests import tiny_models  # noqa: E402
from tests.e2e import served_models  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.engine]
ROOT = Path(__file__).resolve().parents[2]
# Mamba (in and out), attention (q/k/v served as one, o), twice experts (routed, shared up, shared down).
LAYERS = 2 + 2 + 2 * 3


class Arm:
    """An exported checkpoint and what vLLM makes of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = served_models.save_base(folder / "base")
        self.checkpoint = served_models.export_nvfp4(self.base, folder / "nvfp4")
        self.prompts = tiny_models.token_ids(batch=8, length=120, seed=9).tolist()

    def in_vllm(self, dtype: str) -> dict[str, Any]:
        prompts, result = self.folder / "prompts.json", self.folder / f"{dtype}.json"
        prompts.write_text(json.dumps(self.prompts))
        originals = self.checkpoint.with_suffix(".originals.safetensors")
        script = Path(__file__).with_name("engine_side.py")
        command = [engine.engine_python(), script, self.checkpoint, originals, prompts, dtype, result]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "QAT_VLLM_FLOAT32": str(int(dtype == "float32"))}
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        content: dict[str, Any] = json.loads(result.read_text())
        return content


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Arm:
    return Arm(tmp_path_factory.mktemp("arm"))


@pytest.fixture(scope="module")
def in_float32(arm: Arm) -> dict[str, Any]:
    return arm.in_vllm("float32")


def require_equal(layers: dict[str, dict[str, bool]]) -> None:
    assert len(layers) == LAYERS
    assert {name: facts for name, facts in layers.items() if not all(facts.values())} == {}


def test_layers_are_equal_in_float32(in_float32: dict[str, Any]) -> None:
    require_equal(in_float32["layers"])


def test_layers_are_equal_in_bfloat16(arm: Arm) -> None:
    require_equal(arm.in_vllm("bfloat16")["layers"])


def test_the_whole_network_agrees_in_float32(arm: Arm, in_float32: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    from qat.quant import modelopt
    from qat.quant.state import QuantState

    config = json.loads((arm.base / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(arm.base, dtype=torch.float32)
    modelopt.insert_quantizers(model, "all", config)
    modelopt.load_state_into(model, QuantState.load(arm.checkpoint.with_suffix(".quant_state.safetensors")))
    with torch.no_grad():
        logits = model(torch.tensor(arm.prompts)).logits[:, :-1]
        with modelopt.quantizers_off(model):
            unquantized = model(torch.tensor(arm.prompts)).logits[:, :-1].argmax(-1)
    gap = logits.topk(2).values.diff(dim=-1).abs().squeeze(-1)
    decided = gap > 1e-5
    served = torch.tensor(in_float32["best"])
    agreement = (served == logits.argmax(-1))[decided].float().mean().item()
    # The bar means something only where quantization itself moves the answer.
    without = (unquantized == logits.argmax(-1))[decided].float().mean().item()
    print(f"top-1 agreement {agreement:.4f} over {int(decided.sum())} positions; unquantized {without:.4f}")
    assert agreement >= 0.99
    assert without < 0.97
