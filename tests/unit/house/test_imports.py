from __future__ import annotations

import ast
import os
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.unit.house.repository import LINKED, ROOT, python_files

HEAVY = ("torch", "transformers", "modelopt", "peft", "trl", "datasets", "vllm", "scipy")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60
    )


def _loaded(*arguments: str) -> set[str]:
    """Top-level packages that the interpreter imports for these arguments (its own import log is the witness)."""
    log = _run("-X", "importtime", *arguments).stderr
    return {line.rsplit("|", 1)[1].strip().partition(".")[0] for line in log.splitlines() if line.count("|") == 2}


def test_import_qat_loads_nothing_heavy() -> None:
    loaded = _loaded("-c", "import qat")
    assert "qat" in loaded
    assert not loaded & set(HEAVY)


def test_help_loads_nothing_heavy() -> None:
    loaded = _loaded("-m", "qat", "--help")
    assert {"qat", "typer"} <= loaded
    assert not loaded & set(HEAVY)


def test_help_takes_less_than_three_tenths_of_a_second() -> None:
    """Processor time of the best of five: wall time on a busy machine measures the neighbours."""
    _run("-m", "qat", "--help")  # byte code written
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _run("-m", "qat", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.3, f"processor seconds: {[round(seconds, 3) for seconds in spent]}"


@pytest.mark.parametrize("statement", ["import {0}", "import {0}.schema", "from {0} import schema"])
@pytest.mark.parametrize("name", LINKED)
def test_ruff_refuses_the_second_import_path(name: str, statement: str) -> None:
    source = '"""A module."""\n\n' + statement.format(name) + "\n"
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", "qat/some.py", "-"]
    found = subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True, check=False)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "TID251" in found.stdout and f"Import qat.{name}" in found.stdout


def test_nobody_uses_the_second_import_path() -> None:
    """The same rule without ruff, over every Python file, inside functions too."""
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            wrong = [name for name in names if name.partition(".")[0] in LINKED]
            assert not wrong, f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} imports {wrong}"


def test_import_rules_hold() -> None:
    """The contracts of pyproject.toml ([tool.importlinter]), as `lint-imports` judges them."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    linted = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout[-4000:] + linted.stderr[-2000:]


def test_every_imported_distribution_is_declared() -> None:
    distributions = {
        "markdown_it": "markdown-it-py",
        "modelopt": "nvidia-modelopt",
        "pydantic_core": "pydantic",
        "yaml": "pyyaml",
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    declared = {re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower() for line in lines}
    # Imported only inside vLLM's own environment, where the plugin runs, and by pytest, which loads its plugin itself.
    # On a GPU alone: triton comes with torch's CUDA builds, mamba-ssm is used where it is installed.
    elsewhere = {"pytest", "vllm", "triton", "mamba_ssm"}
    for path in python_files():
        if path.relative_to(ROOT).parts[0] not in {"qat", *LINKED} or path.name.startswith("test_"):
            continue  # the probes ship as a test module: whoever runs it has pytest
        for name in _imported_packages(path) - elsewhere:
            assert distributions.get(name, name) in declared, f"{path.relative_to(ROOT)} imports {name}: not declared"


def _imported_packages(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"qat"}
