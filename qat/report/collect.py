"""What the report shows, read from the files of a run folder.

Every part may be missing, because a run may have been broken off or the recipe may not ask for it: a missing or
unreadable file becomes a line of `gaps`, never an error and never an empty table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qat.errors import UserError

WORST_FLIPS = 10


class Reply(NamedTuple):
    """What one arm produced for a case: the messages as lines of text, and why they failed."""

    arm: str
    lines: list[str]
    passed: bool
    failed_checks: list[dict[str, str]]


class Flip(NamedTuple):
    """A case that the reference passes and the candidate fails."""

    case: str
    category: str
    sampling: str
    seed: int
    candidate: Reply
    reference: Reply


class Curve(NamedTuple):
    """One quantity of a log: steps and values, in file order."""

    name: str
    steps: list[float]
    values: list[float]


class Log(NamedTuple):
    """The curves of one training stage."""

    stage: str
    curves: dict[str, Curve]


@dataclass
class Contents:
    """Everything that the page shows; empty where the run has not come so far."""

    name: str
    gaps: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    divergence: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    logs: list[Log] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    flips: list[Flip] = field(default_factory=list)

    @property
    def arms(self) -> list[dict[str, Any]]:
        """The recipe's arms in their order, then arms that only the verdict knows."""
        arms = [dict(arm) for arm in self.recipe.get("arms") or []]
        known = {arm["name"] for arm in arms}
        return arms + [{"name": name} for name in self.verdict.get("arms", {}) if name not in known]

    @property
    def gate(self) -> dict[str, Any]:
        """The gate that was judged by, else the one that the recipe asks for."""
        behavior = self.recipe.get("behavior") or {}
        return self.verdict.get("gate") or behavior.get("gate") or {}

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Stage records of the receipt, the report itself left out: it is being written."""
        return {name: record for name, record in self.receipt.get("stages", {}).items() if name != "report"}


def collect(run_dir: Path) -> Contents:
    """Read a run folder.

    Args:
        run_dir: The folder of one run.

    Returns:
        What is there; `gaps` says what is not.

    Raises:
        UserError: The folder is no run folder (neither recipe nor receipt in it).
    """
    if not any((run_dir / name).is_file() for name in ("recipe.yaml", "receipt.json")):
        raise UserError(
            "There is no run to report on.",
            where=str(run_dir),
            remedy="name a folder that `qat run` or `qat train` has made (it holds recipe.yaml and receipt.json)",
        )
    contents = Contents(name=run_dir.resolve().name)
    gaps = contents.gaps
    contents.recipe = _mapping(run_dir / "recipe.yaml", gaps, "the recipe")
    contents.receipt = _mapping(run_dir / "receipt.json", gaps, "versions, times and hashes")
    contents.verdict = _mapping(run_dir / "verdict.json", gaps, "the verdict and the pass rates")
    contents.divergence = _mapping(run_dir / "divergence.json", gaps, "KL and top-1 agreement")
    contents.audit = _mapping(run_dir / "data" / "audit.json", gaps, "the data audit")
    contents.logs = _logs(run_dir, gaps)
    contents.sizes = _sizes(run_dir, contents)
    contents.flips = _flips(run_dir, contents)
    return contents


def _mapping(path: Path, gaps: list[str], what: str) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping; what keeps it from being read becomes a gap."""
    label = f"{path.parent.name}/{path.name}" if path.parent.name == "data" else path.name
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except FileNotFoundError:
        gaps.append(f"{label} is not there: {what}")
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        gaps.append(f"{label} cannot be read ({error}): {what}")
        return {}
    if not isinstance(content, dict):
        gaps.append(f"{label} holds no mapping: {what}")
        return {}
    return content


def _rows(path: Path, gaps: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a line that is none becomes a gap (a killed process tears the last one)."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            gaps.append(f"{path.parent.name}/{path.name} line {number} is no JSON object: left out")
    return rows


def _logs(run_dir: Path, gaps: list[str]) -> list[Log]:
    paths = [run_dir / "sft" / "log.jsonl", *sorted(run_dir.glob("distill/*/log.jsonl"))]
    found = [
        Log(path.parent.relative_to(run_dir).as_posix(), _curves(_rows(path, gaps))) for path in paths if path.is_file()
    ]
    if not any(log.stage == "sft" for log in found):
        gaps.append("sft/log.jsonl is not there: the loss curves of fine-tuning")
    if not any(log.stage.startswith("distill/") for log in found):
        gaps.append("distill/*/log.jsonl is not there: the curves of distillation")
    return found


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for row in rows:
        step = row.get("step")
        for name in ("loss", "eval_loss", "kl"):
            value = row.get(name)
            if isinstance(step, int | float) and isinstance(value, int | float):
                curve = curves.setdefault(name, Curve(name, [], []))
                curve.steps.append(float(step))
                curve.values.append(float(value))
    return curves


def _sizes(run_dir: Path, contents: Contents) -> dict[str, int]:
    """Bytes on disk of each exported checkpoint; of a folder that was removed, what its stage had noted."""
    sizes = {}
    for arm in contents.arms:
        folder = run_dir / "export" / arm["name"]
        noted = contents.stages.get(f"export/{arm['name']}", {}).get("notes", {}).get("bytes")
        if folder.is_dir():
            sizes[arm["name"]] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        elif isinstance(noted, int):
            sizes[arm["name"]] = noted
    return sizes


def _flips(run_dir: Path, contents: Contents) -> list[Flip]:
    """The flips to the worse of the gate's candidate, those with most failed checks first."""
    candidate, reference = (str(contents.gate.get(role)) for role in ("candidate", "reference"))
    comparison = next((row for row in contents.verdict.get("comparisons", ()) if row.get("arm") == candidate), None)
    if comparison is None or not comparison.get("flips_worse"):
        return []
    sampling = contents.gate.get("sampling")
    results = {arm: _results(run_dir, arm, sampling, contents.gaps) for arm in (candidate, reference)}
    flips = []
    for case in comparison["flips_worse"]:
        for key, ours in results[candidate].items():
            theirs = results[reference].get(key)
            if key[0] == case and theirs and not ours.get("passed") and theirs.get("passed"):
                category = str(ours.get("category", ""))
                flips.append(Flip(case, category, key[1], key[2], _reply(candidate, ours), _reply(reference, theirs)))
                break
    return sorted(flips, key=lambda flip: (-len(flip.candidate.failed_checks), flip.case))[:WORST_FLIPS]


def _results(
    run_dir: Path, arm: str, sampling: str | None, gaps: list[str]
) -> dict[tuple[str, str, int], dict[str, Any]]:
    path = run_dir / "behavior" / f"{arm}.jsonl"
    if not path.is_file():
        gaps.append(f"behavior/{arm}.jsonl is not there: its replies side by side")
        return {}
    return {
        (row["case"], row["sampling"], row["seed"]): row
        for row in _rows(path, gaps)
        if {"case", "sampling", "seed"} <= row.keys() and sampling in (None, row["sampling"])
    }


def _reply(arm: str, result: Mapping[str, Any]) -> Reply:
    lines = []
    for message in result.get("produced") or ():
        if message.get("content"):
            lines.append(str(message["content"]))
        for call in message.get("tool_calls") or ():
            function = call.get("function") or {}
            arguments = function.get("arguments")
            shown = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            lines.append(f"→ {function.get('name')}({shown})")
    return Reply(arm, lines, bool(result.get("passed")), list(result.get("failed_checks") or ()))
