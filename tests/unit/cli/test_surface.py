"""The command line's surface: frozen on purpose, quick, and without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from qat.cli import app

SURFACE = Path(__file__).with_name("surface.json")
ROOT = Path(__file__).resolve().parents[3]


def commands(command: Any, path: str = "qat") -> dict[str, Any]:
    """Every command below with its arguments and options."""
    found: dict[str, Any] = {}
    for name, inner in getattr(command, "commands", {}).items():
        found |= commands(inner, f"{path} {name}")
    if not found or path == "qat":
        own = [" / ".join(p.opts) if p.param_type_name == "option" else p.name.upper() for p in command.params]
        found[path] = sorted(text for text in own if text != "--help")
    return dict(sorted(found.items()))


def test_surface_is_the_recorded_one() -> None:
    """A difference is either a slip or a visible change: then extend surface.json and CHANGELOG.md on purpose."""
    assert commands(typer.main.get_command(app)) == json.loads(SURFACE.read_text())


def test_every_command_that_prints_a_result_has_json() -> None:
    without = [path for path, options in commands(typer.main.get_command(app)).items() if "--json" not in options]
    assert without == ["qat"]


def test_every_command_and_option_has_help() -> None:
    def walk(command: Any, path: str) -> None:
        assert command.help, path
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{path}: {parameter.name}"
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{path} {name}")

    walk(typer.main.get_command(app), "qat")


PROBE = """
import sys
from qat.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "modelopt", "peft", "rich.console", "qat.recipe.schema"} & set(sys.modules)
print("HEAVY", sorted(heavy), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["data", "audit", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() and done.stderr.strip() == "HEAVY []"


def test_help_takes_less_than_a_third_of_a_second() -> None:
    """Processor time, which a busy machine does not stretch; the best of five."""
    best = float("inf")
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-m", "qat", "--help"], capture_output=True, check=True, cwd=ROOT)
        after = os.times()
        best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
    assert best < 0.3


@pytest.mark.parametrize("arguments", [["recipes", "list"], ["validate", "annie_tiny"], ["env"], ["engine", "status"]])
def test_light_commands_load_no_torch(arguments: list[str]) -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert "torch" not in done.stderr.split("HEAVY")[1] and "Traceback" not in done.stderr
    assert time.monotonic() - start < 10


def test_usage_errors_exit_with_2() -> None:
    for arguments in (["nonsense"], ["run", "--nonsense"], ["export", "--format", "int4"], ["data", "render"]):
        done = subprocess.run(
            [sys.executable, "-m", "qat", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 2 and "Error" in done.stderr and "Traceback" not in done.stderr
