"""A baseline: the answers of an arm that later candidates are judged against, as one file to be committed.

It holds which question passed and which did not, without the replies: `qat baseline save` writes it, and a change of it
reads as a change of behaviour. Judging needs neither the old model nor its result file, only the same suite: the hash
must agree, and so must the temperature, top_p and token limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import qat
from qat.behavior.compare import Answers, read_answers
from qat.behavior.gate import Questions, Verdict, judge_answers
from qat.behavior.records import CaseResult, ResultKey, ResultMeta
from qat.behavior.sequential import Look
from qat.behavior.suite import Suite
from qat.errors import UserError
from qat.recipe.schema import GateBlock
from qat.storage import write_atomic

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaselineCase(_Block):
    """What the rates need to know of a case."""

    category: str
    weight: float


class BaselinePass(_Block):
    """One pass over the suite: the ids of the cases by how they were judged, in the order of the suite."""

    sampling: str
    seed: int
    passed: list[str]
    failed: list[str]


class Baseline(_Block):
    """The file.

    Attributes:
        format: Of this file.
        name: Its own.
        saved: When, UTC, ISO 8601.
        qat: Version that wrote it.
        arm: Whose answers these are.
        meta: What they were made with: suite and hash, model, token limit, samplings.
        passes: One per sampling and seed.
        cases: Every case of the suite, in its order.
    """

    format: Literal[1] = 1
    name: str
    saved: str
    qat: str
    arm: str
    meta: ResultMeta
    passes: Annotated[list[BaselinePass], Field(min_length=1)]
    cases: dict[str, BaselineCase]

    @model_validator(mode="after")
    def _known_cases(self) -> Baseline:
        for one in self.passes:
            listed = [*one.passed, *one.failed]
            if strangers := set(listed) - set(self.cases):
                raise ValueError(f"{min(strangers)!r} of a pass is not among the cases")
            if len(set(listed)) < len(listed):
                raise ValueError(f"a case stands twice in the pass {one.sampling}, seed {one.seed}")
        return self

    @property
    def label(self) -> str:
        """As reasons and tables call it: its arm may bear the candidate's name."""
        return f"baseline {self.name}"

    def answers(self) -> Answers:
        """As answers of an arm, without the replies."""
        results = {}
        for one in self.passes:
            for passed, cases in ((True, one.passed), (False, one.failed)):
                for case in cases:
                    key = ResultKey(case, one.sampling, one.seed)
                    results[key] = CaseResult(
                        case=case,
                        category=self.cases[case].category,
                        arm=self.arm,
                        sampling=one.sampling,
                        seed=one.seed,
                        produced=[],
                        passed=passed,
                        failed_checks=[],
                        latency_s=0.0,
                        completion_tokens=0,
                    )
        return Answers(self.label, results, self.meta.samplings, self.meta)

    def questions(self) -> Questions:
        """What was asked."""
        return Questions(
            suite={"name": self.meta.suite, "version": self.meta.version, "sha256": self.meta.sha256},
            categories={name: case.category for name, case in self.cases.items()},
            weights={name: case.weight for name, case in self.cases.items()},
        )


def make_baseline(name: str, results: Path, suite: Suite) -> Baseline:
    """The baseline of a result file.

    Args:
        name: Letters, digits, dot, dash, underscore.
        results: The result file, with its description beside it.
        suite: The suite that it answers.

    Raises:
        UserError: A name that cannot be a file's; results without a description, of another suite, of a part of it, or
            with errors.
    """
    if not _NAME.fullmatch(name):
        raise UserError("This is no name for a baseline.", value=name, remedy="use letters, digits, '.', '-' and '_'")
    answers = read_answers(results)
    if answers.meta is None:
        raise UserError("Nothing says what these results were made with.", where=str(results))
    if answers.meta.sha256 != suite.sha256:
        raise UserError(
            "The results answer another suite.",
            where=str(results),
            value=f"{answers.meta.suite} {answers.meta.sha256[:12]}, not {suite.name} {suite.sha256[:12]}",
        )
    if errors := len(answers.results) - len(answers.answered):
        raise UserError(
            "A baseline must be whole.",
            where=str(results),
            value=f"{errors} of {len(answers.results)} questions ended in an error",
            remedy="run the suite again: only these are asked",
        )
    order = {case.id: position for position, case in enumerate(suite.cases)}
    if strangers := [key.case for key in answers.results if key.case not in order]:
        raise UserError("The results hold cases that the suite does not know.", where=str(results), value=strangers[0])
    passes = dict.fromkeys((key.sampling, key.seed) for key in answers.results)
    for sampling, seed in passes:
        asked = {order[key.case] for key in answers.results if (key.sampling, key.seed) == (sampling, seed)}
        # A recipe may limit a sampling to the first cases; any other gap is a part of the suite, or one of its shards.
        if len(asked) <= max(asked):
            raise UserError(
                "A baseline must be whole.",
                where=str(results),
                value=f"{len(asked)} of {len(order)} cases were asked, sampling {sampling!r}, seed {seed}",
                remedy="ask without --only, and join the shards: qat suite merge",
            )

    def cases(sampling: str, seed: int, passed: bool) -> list[str]:
        wanted = (sampling, seed, passed)
        found = (key.case for key, r in answers.results.items() if (key.sampling, key.seed, r.passed) == wanted)
        return sorted(found, key=order.__getitem__)

    return Baseline(
        name=name,
        saved=datetime.now(UTC).isoformat(timespec="seconds"),
        qat=qat.__version__,
        arm=answers.name,
        meta=answers.meta,
        passes=[
            BaselinePass(
                sampling=sampling, seed=seed, passed=cases(sampling, seed, True), failed=cases(sampling, seed, False)
            )
            for sampling, seed in passes
        ],
        cases={case.id: BaselineCase(category=case.category, weight=case.weight) for case in suite.cases},
    )


def save_baseline(baseline: Baseline, folder: Path, replace: bool) -> Path:
    """Write it as `<folder>/<name>.json`.

    Raises:
        UserError: There is one of this name and `replace` is False, or the disk is full.
    """
    path = folder / f"{baseline.name}.json"
    if path.exists() and not replace:
        raise UserError(
            "There is a baseline of this name.", where=str(path), remedy="choose another name, or pass --replace"
        )
    write_atomic(path, baseline.model_dump_json(indent=1) + "\n")
    return path


def load_baseline(name_or_path: str, folder: Path) -> Baseline:
    """Read a baseline.

    Args:
        name_or_path: A name in `folder`, or the path of a JSON file.
        folder: Where baselines lie.

    Raises:
        UserError: There is none, or the file is no baseline.
    """
    path = Path(name_or_path) if name_or_path.endswith(".json") else folder / f"{name_or_path}.json"
    try:
        content = path.read_bytes()
    except OSError as error:
        known = ", ".join(each.stem for each in _files(folder))
        raise UserError(
            "There is no such baseline.",
            where=str(path),
            remedy=f"baselines here: {known}" if known else "save one: qat baseline save NAME ARM",
        ) from error
    try:
        return Baseline.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(
            "This file is no baseline.",
            where=str(path),
            value=f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}",
        ) from error


def list_baselines(folder: Path) -> list[Baseline]:
    """Every baseline of a folder, by name."""
    return [load_baseline(path.stem, folder) for path in _files(folder)]


def _files(folder: Path) -> Iterable[Path]:
    return sorted(folder.glob("*.json"))


def judge_against(results: Path, baseline: Baseline, gate: GateBlock, look: Look | None = None) -> Verdict:
    """Judge a result file against a baseline.

    Args:
        results: The candidate's answers, with their description beside them.
        baseline: The reference.
        gate: Sampling, floor, drop and confidence; its candidate and reference are set here.
        look: Which look at this candidate it is; None: the only one.

    Raises:
        UserError: The results answer another suite, or were made with another token limit or other settings of the
            sampling; they or the baseline hold nothing under the gate's sampling.
    """
    candidate = read_answers(results)
    _require_same(candidate, baseline, gate.sampling, results)
    block = gate.model_copy(update={"candidate": candidate.name, "reference": baseline.label})
    arms = {baseline.label: baseline.answers(), candidate.name: candidate}
    return judge_answers(arms, baseline.questions(), block, look)


def _require_same(candidate: Answers, baseline: Baseline, sampling: str, path: Path) -> None:
    meta, stored = candidate.meta, baseline.meta
    if meta is None:
        raise UserError("Nothing says what these results were made with.", where=str(path))
    if meta.sha256 != stored.sha256:
        raise UserError(
            "The results and the baseline answer different suites.",
            where=f"{path} and {baseline.label}",
            value=f"{meta.suite} {meta.version} {meta.sha256[:12]} and {stored.suite} {stored.version} "
            f"{stored.sha256[:12]}",
            remedy="ask the reference the suite of today and save that as the baseline",
        )
    if strangers := [key.case for key in candidate.results if key.case not in baseline.cases]:
        raise UserError("The results hold cases that the suite does not know.", where=str(path), value=strangers[0])
    mine, theirs = meta.samplings.get(sampling), stored.samplings.get(sampling)
    if mine is not None and theirs is not None and (mine, meta.max_tokens) != (theirs, stored.max_tokens):
        raise UserError(
            f"Sampling {sampling!r} of the results is not that of the baseline.",
            where=f"{path} and {baseline.label}",
            value=f"{mine}, {meta.max_tokens} tokens, and {theirs}, {stored.max_tokens} tokens",
            remedy="ask with the baseline's settings, or save a new baseline",
        )
