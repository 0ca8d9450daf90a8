from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.unit.house.repository import ROOT, repository_files

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def _script(name: str) -> ModuleType:
    """A file of scripts/ as a module; scripts is no package."""
    spec = importlib.util.spec_from_file_location(f"qat_script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pages() -> list[Path]:
    return [path for path in repository_files() if path.suffix == ".md"]


def _anchors(page: Path) -> set[str]:
    """GitHub's anchors: lower case, punctuation dropped, blanks to dashes."""
    heads = re.findall(r"^#{1,6} +(.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_relative_links_resolve() -> None:
    broken = []
    for page in _pages():
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            goal = (page.parent / file).resolve() if file else page
            if not goal.exists() or ROOT not in (goal, *goal.parents):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
            elif anchor and goal.suffix == ".md" and anchor not in _anchors(goal):
                broken.append(f"{page.relative_to(ROOT)}: {target} (no such heading)")
    assert not broken, "\n".join(broken)


def test_recipe_reference_is_fresh() -> None:
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == _script("make_docs").render(), (
        "run python scripts/make_docs.py"
    )


def test_recipe_reference_names_every_key() -> None:
    """Walked over the pydantic classes, not over the JSON schema that the generator reads."""
    from pydantic import BaseModel

    from qat.recipe.schema import Recipe

    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    seen: set[type[BaseModel]] = set()
    queue: list[type[BaseModel]] = [Recipe]
    while queue:
        block = queue.pop()
        if block in seen:
            continue
        seen.add(block)
        for key, field in block.model_fields.items():
            assert f"| `{key}` |" in text, f"{block.__name__}.{key}"
            queue += [other for other in _blocks(field.annotation) if issubclass(other, BaseModel)]
    assert len(seen) > 10


def _blocks(annotation: object) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _blocks(part)]


def test_chain_picture_is_well_formed_and_knows_the_dark() -> None:
    path = ROOT / "docs" / "img" / "chain.svg"
    tree = ElementTree.parse(path)
    assert tree.getroot().get("viewBox")
    assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")


def _command_lines() -> set[str]:
    """What follows `qat ` in code spans and console blocks of the pages a user reads."""
    lines: set[str] = set()
    for page in _pages():
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"```console\n(.*?)```", text, re.S)
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        for line in [*"\n".join(blocks).splitlines(), *spans]:
            found = re.match(r"(?:\S*bin/)?qat ([a-z-][^#]*)", line)
            if found:
                lines.add(found[1].strip())
    return lines


def test_pages_name_only_commands_and_options_that_exist() -> None:
    import typer

    from qat.cli import app

    lines = _command_lines()
    assert len(lines) > 20
    for line in lines:
        command: Any = typer.main.get_command(app)
        words = [word.strip("[]") for word in line.split()]
        while words and isinstance(getattr(command, "commands", None), dict) and not words[0].startswith("-"):
            assert words[0] in command.commands, f"`qat {line}`: no such command"
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - options
        assert not unknown, f"`qat {line}`: no option {sorted(unknown)}"


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A run of three arms with numbers chosen so that the table can be worked out by hand."""
    run = tmp_path / "annie_tiny_full"
    run.mkdir()

    def arm(passed: int, n: int, low: float | None, high: float | None) -> dict[str, object]:
        rate = passed / n if low is not None else None
        return {"overall": {"passed": passed, "n": n, "rate": rate, "low": low, "high": high}}

    arms = {
        "bf16": arm(975, 1000, 0.9633, 0.983),
        "nvfp4_all_qad": arm(970, 1000, 0.9575, 0.979),
        "base": arm(1, 4, None, None),
    }
    # The keys that the table reads; a verdict holds more.
    comparison = {
        "arm": "nvfp4_all_qad",
        "reference": "bf16",
        "difference": -0.005,
        "ci_low": -0.0142,
        "ci_high": 0.0042,
    }
    reasons = ["floor held", "drop excluded"]
    verdict: dict[str, object] = {"verdict": "PASS", "reasons": reasons, "arms": arms, "comparisons": [comparison]}
    verdict["gate"] = {"confidence": 0.95}
    (run / "verdict.json").write_text(json.dumps(verdict), encoding="utf-8")
    (run / "divergence.json").write_text(
        json.dumps({"nvfp4_all_qad": {"kl": 0.01234, "kl_se": 0.00051, "top1": 0.9871}}), encoding="utf-8"
    )
    return run


def test_readme_table_from_a_run(finished_run: Path) -> None:
    assert _script("update_readme").arms_table(finished_run).splitlines() == [
        "| arm | pass rate (95 % interval) | cases | difference to `bf16` "
        "| KL to BF16 ± its standard error, nats a token | same top token |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `bf16` | 97.5 % (96.3 to 98.3) | 1000 |  |  |  |",
        "| `nvfp4_all_qad` | 97.0 % (95.8 to 97.9) | 1000 | -0.5 points (-1.4 to +0.4) | 0.0123 ± 0.0005 | 98.7 % |",
        "| `base` | too few | 4 |  |  |  |",
        "",
        "`annie_tiny_full`: **PASS**. floor held; drop excluded",
    ]


def test_readme_update_touches_only_its_block() -> None:
    script = _script("update_readme")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    once = script.update(readme, "table 1")
    assert "<!-- arms:begin -->\ntable 1\n<!-- arms:end -->" in once
    assert script.update(script.update(readme, "table 2"), "table 1") == once
    assert once.split("<!-- arms:begin -->")[0] == readme.split("<!-- arms:begin -->")[0]
    assert once.split("<!-- arms:end -->")[1] == readme.split("<!-- arms:end -->")[1]
    with pytest.raises(ValueError, match="arms:begin"):
        script.update("no markers", "new")


def test_update_readme_refuses_an_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _script("update_readme").main([str(tmp_path)]) == 2
    assert "verdict.json" in capsys.readouterr().err


def test_scripts_are_importable_without_side_effects() -> None:
    before = set(sys.modules)
    _script("make_docs")
    assert "torch" not in set(sys.modules) - before
