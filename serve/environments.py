"""Makes the two Python environments from the committed lock files: the toolkit's and vLLM's own.

Runs before anything is installed (`scripts/setup_env.py`, called by `make setup`), so it needs the standard library
alone; `qat engine install` calls the same code.

torch stands apart from the lock files: which build fits is the machine's matter. It is installed first, looked at, and
the rest follows with `--no-deps`, so that nothing can pull another one.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qat.errors import UserError

TORCH = "torch==2.13.0"
STAMP = ".qat-setup"
_NO_INDEX_HINT = (
    "Set QAT_TORCH_INDEX to the address of a package index that has CPU builds of torch (PyTorch publishes one), or "
    "TORCH to a requirement or wheel file of such a build, and run the same command again."
)


class Environment(NamedTuple):
    """One environment to make.

    Attributes:
        name: `toolkit` or `engine`.
        folder: Where it stands.
        locks: Requirement files with one exact version a line.
        cpu_torch_only: Whether a CUDA build of torch breaks it.
    """

    name: str
    folder: Path
    locks: tuple[Path, ...]
    cpu_torch_only: bool

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"


def project_root() -> Path:
    """The checkout that this code runs from.

    Raises:
        UserError: qat was installed from a wheel: there are no lock files then.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "requirements").is_dir():
        raise UserError(
            "The lock files are not here: qat was not installed from a checkout.",
            where=str(root / "requirements"),
            remedy="Clone the repository and run `make setup`, or set QAT_ENGINE to an environment that has vLLM.",
        )
    return root


def toolkit(root: Path) -> Environment:
    """The environment of the command line, training, export and tests."""
    locks = (root / "requirements" / "toolkit.txt", root / "requirements" / "dev.txt")
    return Environment("toolkit", root / ".venv", locks, cpu_torch_only=False)


def engine(root: Path, folder: Path) -> Environment:
    """VLLM's environment."""
    return Environment("engine", folder, (root / "requirements" / "engine.txt",), cpu_torch_only=True)


def make(environment: Environment, root: Path, say: Callable[[str], None]) -> bool:
    """Create or complete an environment; does nothing where it is up to date.

    Args:
        environment: What to make.
        root: The checkout, installed into it as an editable package.
        say: Told of each step.

    Returns:
        Whether anything was done.

    Raises:
        UserError: Python is too old, pip failed, or torch's build does not fit the machine.
    """
    require_python(sys.version_info[:2])
    stamp = environment.folder / STAMP
    wanted = fingerprint(environment, root)
    if environment.python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return False
    start = time.monotonic()
    stamp.unlink(missing_ok=True)
    if not environment.python.exists():
        say(f"{environment.name}: creating {environment.folder}")
        _run([sys.executable, "-m", "venv", str(environment.folder)], "The environment cannot be created.")
    _install_torch(environment, say)
    for lock in environment.locks:
        say(f"{environment.name}: installing {lock.name}")
        _pip(environment, ["--no-deps", "--requirement", str(lock)])
    say(f"{environment.name}: installing qat")
    _pip(environment, ["--no-deps", "--no-build-isolation", "--editable", str(root)])
    stamp.write_text(wanted, encoding="utf-8")
    say(f"{environment.name}: ready after {time.monotonic() - start:.0f} s")
    return True


def require_python(version: tuple[int, ...]) -> None:
    """Refuse an interpreter that is too old.

    Raises:
        UserError: It is older than 3.11.
    """
    if version < (3, 11):
        raise UserError(
            "qat needs Python 3.11 or newer.",
            value=".".join(map(str, version)),
            remedy="Install one and name it: make setup PYTHON=python3.11",
        )


def fingerprint(environment: Environment, root: Path) -> str:
    """Hash of everything that decides what is installed: locks, torch, interpreter, qat's own packaging."""
    digest = hashlib.sha256()
    for path in (*environment.locks, root / "pyproject.toml"):
        digest.update(path.read_bytes())
    digest.update(f"{torch_requirement()} {os.environ.get('QAT_TORCH_INDEX', '')} {sys.version_info[:2]}".encode())
    return digest.hexdigest() + "\n"


def torch_requirement() -> str:
    """`$TORCH`, by default the release that the locks were tried with."""
    return os.environ.get("TORCH") or TORCH


class TorchBuild(NamedTuple):
    """What an installed torch says of itself.

    Attributes:
        version: For example `2.13.0+cpu`.
        cuda: Version of CUDA it was built for, None for a CPU build.
    """

    version: str
    cuda: str | None


def read_torch_build(folder: Path) -> TorchBuild | None:
    """Read torch's `version.py` in an environment, without importing torch (a CUDA build may lack its libraries)."""
    found = sorted(folder.glob("lib/python3*/site-packages/torch/version.py"))
    if not found:
        return None
    text = found[-1].read_text(encoding="utf-8")
    version = re.search(r"^__version__\s*(?::[^=]*)?=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    cuda = re.search(r"^cuda\s*(?::[^=]*)?=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return TorchBuild(version[1], cuda[1] if cuda else None) if version else None


def require_fitting_torch(build: TorchBuild | None, environment: Environment, has_gpu: bool) -> None:
    """Refuse a torch that cannot work here.

    Raises:
        UserError: None is installed; vLLM's CPU build would meet another release or a CUDA build; or a CUDA build
            stands on a machine without a GPU.
    """
    where = str(environment.folder)
    if build is None:
        raise UserError("torch is not installed.", where=where, remedy=_NO_INDEX_HINT)
    release = build.version.partition("+")[0]
    if environment.cpu_torch_only and (build.cuda or release != TORCH.partition("==")[2]):
        raise UserError(
            f"vLLM for CPU needs a CPU build of {TORCH}.",
            where=where,
            value=_describe(build),
            remedy=_NO_INDEX_HINT,
        )
    if build.cuda and not has_gpu:
        raise UserError(
            "torch was built for CUDA, and this machine has no NVIDIA GPU.",
            where=where,
            value=_describe(build),
            remedy=_NO_INDEX_HINT,
        )


def _describe(build: TorchBuild) -> str:
    return f"torch {build.version}, " + (f"built for CUDA {build.cuda}" if build.cuda else "a CPU build")


def _install_torch(environment: Environment, say: Callable[[str], None]) -> None:
    say(f"{environment.name}: installing {torch_requirement()}")
    index = os.environ.get("QAT_TORCH_INDEX")
    arguments = [*(["--index-url", index] if index else []), torch_requirement()]
    # First torch alone: a CUDA build's libraries are gigabytes that a refusal would have fetched for nothing.
    _pip(environment, ["--no-deps", *arguments])
    build = read_torch_build(environment.folder)
    require_fitting_torch(build, environment, has_gpu=Path("/dev/nvidiactl").exists())
    if build and build.cuda:
        _pip(environment, arguments)


def _pip(environment: Environment, arguments: list[str]) -> None:
    command = [str(environment.python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
    _run(
        command, "pip could not install what is needed.", remedy="" if "--requirement" in arguments else _NO_INDEX_HINT
    )


def _run(command: list[str], what: str, remedy: str = "") -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode:
        tail = "\n          ".join(line for line in result.stdout.splitlines() if line.strip())
        raise UserError(what, where=" ".join(command), value=tail[-2000:], remedy=remedy)
