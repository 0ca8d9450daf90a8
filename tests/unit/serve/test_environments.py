from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.serve import environments
from qat.serve.environments import Environment, TorchBuild

ROOT = Path(__file__).resolve().parents[3]
TOOLKIT = Environment("toolkit", Path("/e"), (), cpu_torch_only=False)
ENGINE = Environment("engine", Path("/e"), (), cpu_torch_only=True)


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.13.0"])
@pytest.mark.parametrize("environment", [TOOLKIT, ENGINE])
def test_a_cpu_build_fits_everywhere(environment: Environment, version: str) -> None:
    environments.require_fitting_torch(TorchBuild(version, None), environment, has_gpu=False)


@pytest.mark.parametrize(
    ("build", "environment", "has_gpu", "shown"),
    [
        (None, TOOLKIT, False, "not installed"),
        (TorchBuild("2.13.0", "13.0"), TOOLKIT, False, "built for CUDA 13.0"),
        (TorchBuild("2.13.0", "13.0"), ENGINE, True, "built for CUDA 13.0"),
        (TorchBuild("2.12.1+cpu", None), ENGINE, False, "torch 2.12.1"),
    ],
)
def test_a_wrong_build_is_refused_with_what_to_set(
    build: TorchBuild | None, environment: Environment, has_gpu: bool, shown: str
) -> None:
    with pytest.raises(UserError, match=shown) as caught:
        environments.require_fitting_torch(build, environment, has_gpu)
    assert "QAT_TORCH_INDEX" in str(caught.value)


def test_a_cuda_build_is_right_for_the_toolkit_on_a_gpu() -> None:
    environments.require_fitting_torch(TorchBuild("2.13.0", "13.0"), TOOLKIT, has_gpu=True)


def test_the_build_is_read_without_importing_torch(tmp_path: Path) -> None:
    assert environments.read_torch_build(tmp_path) is None
    package = tmp_path / "lib" / "python3.11" / "site-packages" / "torch"
    package.mkdir(parents=True)
    text = "from typing import Optional\n__version__ = '2.13.0+cu130'\ndebug = False\ncuda: Optional[str] = '13.0'\n"
    (package / "version.py").write_text(text)
    assert environments.read_torch_build(tmp_path) == TorchBuild("2.13.0+cu130", "13.0")
    (package / "version.py").write_text(text.replace("'13.0'", "None").replace("cu130", "cpu"))
    assert environments.read_torch_build(tmp_path) == TorchBuild("2.13.0+cpu", None)


def test_the_reader_agrees_with_the_torch_that_runs() -> None:
    torch = pytest.importorskip("torch")
    build = environments.read_torch_build(Path(torch.__file__).parents[4])
    assert build == TorchBuild(torch.__version__, torch.version.cuda)


@pytest.mark.parametrize("version", [(3, 8), (3, 10)])
def test_an_old_python_is_refused(version: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"3\.11 or newer"):
        environments.require_python(version)


def test_an_up_to_date_environment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("a==1\n")
    environment = Environment("toolkit", tmp_path / "env", (lock,), cpu_torch_only=False)
    environment.python.parent.mkdir(parents=True)
    environment.python.write_text("#!/bin/sh\nexit 1\n")
    (environment.folder / environments.STAMP).write_text(environments.fingerprint(environment, ROOT))
    said: list[str] = []
    assert environments.make(environment, ROOT, said.append) is False
    assert said == []

    # Any change of what decides the contents is noticed; this `python` then fails as pip would.
    environment.python.chmod(0o755)
    monkeypatch.setenv("TORCH", "torch==2.12.0")
    with pytest.raises(UserError, match="pip could not install"):
        environments.make(environment, ROOT, said.append)
    assert not (environment.folder / environments.STAMP).exists()
    monkeypatch.delenv("TORCH")
    lock.write_text("a==2\n")
    with pytest.raises(UserError, match="pip could not install"):
        environments.make(environment, ROOT, said.append)


@pytest.mark.parametrize("name", ["toolkit", "dev", "engine"])
def test_locks_hold_one_exact_version_a_line_and_no_torch(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == sorted(pins, key=str.lower)
    names = [pin.partition("==")[0].lower() for pin in pins]
    assert all("==" in pin and "/" not in pin for pin in pins)
    assert len(set(names)) == len(names)
    assert not {"torch", "torchvision", "torchaudio", "triton"} & set(names)


def test_setup_needs_nothing_but_the_standard_library() -> None:
    code = "import sys; sys.path.insert(0, '.'); import qat.serve.environments, qat.serve.engine"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=ROOT, check=True)
