"""mamba-ssm and bitsandbytes: stand-ins with the same faults, and the libraries themselves where they are installed."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.patches.protocol import Status
from qat.patches.registry import find

KERNELS, REPACK, EXPERTS = "mamba_ssm_kernels_without_build", "bitsandbytes_cpu_repack", "bitsandbytes_fused_experts"


@pytest.fixture
def patches() -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {defect.name: defect for defect in find(KERNELS, REPACK, EXPERTS, "nemotron_h_fused_mamba")}
    yield found
    for defect in found.values():
        if hasattr(defect, "revert"):
            defect.revert()


# mamba-ssm -----------------------------------------------------------------------------------------------------------

SCAN = """
def mamba_chunk_scan_combined(hidden_states, chunk_size):
    return f"Triton scan by {chunk_size}"
def mamba_split_conv1d_scan_combined(*_, **__):
    return "fused"
"""


@pytest.fixture
def half_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mamba-ssm without its CUDA extension on a machine with a GPU."""
    if find_spec("mamba_ssm") is not None:
        pytest.skip("a real mamba-ssm is installed")
    package = tmp_path / "mamba_ssm"
    (package / "ops" / "triton").mkdir(parents=True)
    (package / "__init__.py").write_text("from mamba_ssm.ops.selective_scan_interface import selective_scan_fn\n")
    (package / "ops" / "selective_scan_interface.py").write_text("import selective_scan_cuda\n")
    (package / "ops" / "triton" / "ssd_combined.py").write_text(SCAN)
    (package / "ops" / "triton" / "selective_state_update.py").write_text("def selective_state_update(state): ...\n")
    for folder in (package / "ops", package / "ops" / "triton"):
        (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def takes_kernel(modeling: Any, name: str) -> bool:
    """Whether one of Transformers' functions has decided for a kernel, on a GPU at least."""
    function = getattr(modeling, name)
    function = inspect.getclosurevars(function).nonlocals.get("kernel", function)
    return bool(inspect.getclosurevars(function).nonlocals["is_new_implementation"])


def test_triton_kernels_behind_a_broken_package(half_built: None, patches: dict[str, Any]) -> None:
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    patch = patches[KERNELS]
    with pytest.raises(ModuleNotFoundError, match="selective_scan_cuda"):
        importlib.import_module("mamba_ssm")
    assert patch.probe().status is Status.NEEDED
    assert not [name for name in sys.modules if name.startswith("mamba_ssm")]
    names = ("mamba2_chunk_scan", "mamba2_selective_state_update", "mamba2_split_conv1d_scan_combined")
    functions = [getattr(modeling, name) for name in names]
    patch.apply()
    patch.apply()
    assert patch.probe().status is Status.APPLIED
    # Transformers has decided again, but not for the kernel that bypasses out_proj.
    assert [takes_kernel(modeling, name) for name in names] == [True, True, False]
    assert modeling.mamba2_chunk_scan(SimpleNamespace(is_cuda=True), chunk_size=16) == "Triton scan by 16"
    # Probes run on the CPU, where a Triton kernel cannot.
    assert inspect.getclosurevars(modeling.mamba2_chunk_scan).nonlocals["elsewhere"] is functions[0]
    patch.revert()
    assert [getattr(modeling, name) for name in names] == functions
    assert patch.probe().status is Status.NEEDED
    assert not [name for name in sys.modules if name.startswith("mamba_ssm")]


def test_a_kernel_that_is_broken_itself_stays_needed(half_built: None, patches: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mamba_ssm" / "ops" / "triton" / "ssd_combined.py").write_text("raise RuntimeError('no Triton here')\n")
    patches[KERNELS].apply()
    found = patches[KERNELS].probe()
    assert found.status is Status.NEEDED and "no Triton here" in found.detail


def test_nothing_to_tell_without_the_package_or_a_gpu(patches: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in patches[KERNELS].probe().detail
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if find_spec("mamba_ssm") is None:
        assert patches[KERNELS].probe().status is Status.CANNOT_TELL
        patches[KERNELS].apply()
        assert "mamba_ssm" not in sys.modules


# bitsandbytes --------------------------------------------------------------------------------------------------------


class Params4bit(Tensor):
    """Two numbers of four bits a byte, as a column."""

    @staticmethod
    def __new__(cls, data: Tensor, *_: Any, **__: Any) -> Any:
        packed = (data.reshape(-1, 2) * 7).round().to(torch.int16) + 8
        return (packed[:, :1] * 16 + packed[:, 1:]).to(torch.uint8)


class Linear4bit(nn.Module):
    """The fault of bitsandbytes 0.50: an eval forward rearranges the weight in place, and training cannot read it."""

    def __init__(self, inputs: int, outputs: int, **_: Any) -> None:
        super().__init__()
        self.shape = (outputs, inputs)
        self.support_avx512bf16_for_cpu = True
        self.weight: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.support_avx512bf16_for_cpu and not self.training and self.weight.shape[1] == 1:
            self.weight = nn.Parameter(self.weight.view(self.shape[0], -1).flip(0), requires_grad=False)
        if self.weight.shape[1] != 1:
            return (x.detach() @ torch.zeros(self.shape[::-1], dtype=x.dtype)).requires_grad_()
        numbers = torch.cat([self.weight // 16, self.weight % 16], 1).float()
        return x @ ((numbers - 8) / 7).reshape(self.shape).T.to(x.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor):
            value = nn.Parameter(value, requires_grad=False)
        super().__setattr__(name, value)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    importlib.import_module("transformers.integrations.bitsandbytes")  # before the stand-in, which has no version
    package: Any = ModuleType("bitsandbytes")
    package.nn, package.functional = ModuleType("bitsandbytes.nn"), ModuleType("bitsandbytes.functional")
    package.nn.Linear4bit, package.nn.Params4bit = type("Linear4bit", (Linear4bit,), {}), Params4bit
    package.functional.has_avx512bf16 = lambda: True
    for module in (package, package.nn, package.functional):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


def test_an_evaluation_does_not_spoil_training(stand_in: Any, patches: dict[str, Any]) -> None:
    patch = patches[REPACK]
    assert patch.probe().status is Status.NEEDED
    before = stand_in.nn.Linear4bit(4, 4)
    patch.apply()
    patch.apply()
    during = stand_in.nn.Linear4bit(4, 4)
    assert patch.probe().status is Status.APPLIED
    # Layers from before and from now alike.
    assert not before.support_avx512bf16_for_cpu and not during.support_avx512bf16_for_cpu
    patch.revert()
    assert before.support_avx512bf16_for_cpu and during.support_avx512bf16_for_cpu
    assert patch.probe().status is Status.NEEDED


def test_other_processors_are_not_affected(stand_in: Any, patches: dict[str, Any]) -> None:
    stand_in.functional.has_avx512bf16 = lambda: False
    assert patches[REPACK].probe().status is Status.CANNOT_TELL


def test_without_bitsandbytes_nobody_can_tell(patches: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert patches[REPACK].probe().status is Status.CANNOT_TELL
    assert patches[EXPERTS].probe().status is Status.CANNOT_TELL


@pytest.mark.parametrize("taken", [False, True])
def test_fused_experts_after_loading_in_4_bits(
    stand_in: Any, patches: dict[str, Any], monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """Transformers replaces linears; a version that also took the experts would end the defect."""
    from transformers.integrations import bitsandbytes as integration

    def replace(model: Any, quantization_config: Any) -> Any:
        assert quantization_config.load_in_4bit
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, nn.Identity())
            elif taken and name.endswith(".experts"):
                for parameter in ("up_proj", "down_proj"):
                    packed = torch.zeros(2, 8, 8, dtype=torch.uint8)
                    setattr(module, parameter, nn.Parameter(packed, requires_grad=False))
        return model

    monkeypatch.setattr(integration, "replace_with_bnb_linear", replace)
    assert patches[EXPERTS].probe().status is (Status.NOT_NEEDED if taken else Status.NEEDED)


def test_the_way_around_4_bit_loading_upcasts_nothing(patches: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    assert patches[EXPERTS].verify().status is Status.NOT_NEEDED
    original = peft.get_peft_model
    monkeypatch.setattr(peft, "get_peft_model", lambda model, *rest: original(model.float(), *rest))
    assert patches[EXPERTS].verify().status is Status.NEEDED


def test_the_real_library(patches: dict[str, Any]) -> None:
    """What the stand-in claims, on bitsandbytes itself."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert patches[EXPERTS].probe().status is Status.NEEDED
    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("this processor has no AVX512-BF16")
    assert patches[REPACK].probe().status is Status.NEEDED
    patches[REPACK].apply()
    assert patches[REPACK].probe().status is Status.APPLIED
