"""A check against people: replies are laid out to be labelled, and the check's verdicts are compared with the labels.

What a judge model is worth can only be said on replies that somebody read: `write_sheet` draws them from a result file,
a reader writes `pass` or `fail` into each line, and `compare_with_reader` lets the check judge the same replies. The
lines are those of the labelled replies that the shipped checks are measured by (`labels/README.md`).
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from qat.behavior.answers import AnsweredBy
from qat.behavior.checks import BoundCheck, CheckError, Reply, bind
from qat.behavior.conversation import Message, Talk, converse
from qat.behavior.quality import Agreement, LabelledReply, Quality, Share, agreement, quality_of, read_label, share
from qat.behavior.records import CaseResult, read_meta, read_results
from qat.behavior.suite import Suite
from qat.errors import UserError
from qat.storage import write_atomic

AT_ONCE = 8
"""Replies judged together; a judge model answers several requests at a time."""


class Sheet(NamedTuple):
    """The labelled lines of a file.

    Attributes:
        records: Those that a reader has judged.
        open: How many wait for a label.
    """

    records: list[LabelledReply]
    open: int


class AgainstReader(NamedTuple):
    """A check beside the reader.

    Attributes:
        quality: Precision and recall of the check's fails.
        equal: Share of equal verdicts.
        agreement: Cohen's kappa.
        errors: Replies that the check could not judge, by id; they are in none of the figures.
    """

    quality: Quality
    equal: Share
    agreement: Agreement | None
    errors: dict[str, str]


def write_sheet(suite: Suite, results: Path, check: str, out: Path, count: int, seed: int) -> int:
    """Draw replies that a check judges, one line each, with a label to be filled in.

    Args:
        suite: That the results answer.
        results: The result file.
        check: Name of the check; replies of cases and turns without it are left out.
        out: The file to write.
        count: Most replies; cases take turns, so that repeats of one come last.
        seed: Of the draw.

    Returns:
        Lines written.

    Raises:
        UserError: The results answer another suite, hold no reply that the check judges, or `out` exists: labels are
            work, and are not overwritten.
    """
    if out.exists():
        raise UserError("The file to write exists.", where=str(out), remedy="name another one, or remove it")
    meta = read_meta(results)
    if meta is None or meta.sha256 != suite.sha256:
        raise UserError("The results answer another suite.", where=str(results), value=f"not {suite.name}")
    found = [answer for answer in read_results(results).results.values() if answer.error is None]
    rows = [row for answer in _by_turns(found, random.Random(seed)) for row in _rows(suite, answer, check)][:count]
    if not rows:
        raise UserError(
            "No reply in these results is judged by this check.",
            where=str(results),
            value=check,
            remedy=f"checks of the suite: {', '.join(_checks_of(suite))}",
        )
    write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def _checks_of(suite: Suite) -> list[str]:
    return sorted({check.name for case in suite.cases for check in suite.script(case).all_checks})


def _by_turns(answers: Sequence[CaseResult], chance: random.Random) -> list[CaseResult]:
    """In random order, the first of every case before the second of any."""
    shuffled = sorted(answers, key=lambda answer: answer.key)
    chance.shuffle(shuffled)
    seen: dict[str, int] = {}
    rank = {}
    for answer in shuffled:
        rank[answer.key] = seen[answer.case] = seen.get(answer.case, -1) + 1
    return sorted(shuffled, key=lambda answer: rank[answer.key])


def _rows(suite: Suite, answer: CaseResult, name: str) -> Iterator[dict[str, Any]]:
    """The lines of one answer: the case is played again with what was said, so that the check sees what it saw then."""
    case, talk, said = suite.by_id[answer.case], Talk(), iter(answer.produced)

    async def ask(messages: list[Message]) -> AnsweredBy:
        return AnsweredBy({key: value for key, value in next(said).items() if key != "turn"}, 0)

    script = suite.script(case)
    asyncio.run(converse(case, script, ask, talk))
    turns = enumerate(zip(script.turns, talk.replies, strict=False), start=1)
    judged = [(turn.checks, reply, f"/{number}") for number, (turn, reply) in turns]
    for checks, reply, part in [*judged, (script.checks, talk.whole(case), "")]:
        for position, check in enumerate(each for each in checks if each.name == name):
            yield {
                "id": f"{answer.case}/{answer.sampling}/{answer.seed}{part}" + f"#{position + 1}" * (position > 0),
                "source": answer.arm,
                "licence": "",
                "context": {
                    "messages": list(reply.context),
                    "tools": list(reply.tools),
                    "tool_results": list(reply.tool_results),
                },
                "produced": [_plain(message) for message in reply.produced],
                "params": {name: check.params.model_dump(mode="json", exclude_unset=True)},
                "labels": {name: None},
            }


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key in ("content", "tool_calls", "finish_reason")}


def read_sheet(path: Path) -> Sheet:
    """Read a file of labelled replies; a label of null waits for its reader.

    Raises:
        UserError: The file cannot be read, or a line is no labelled reply.
    """
    try:
        # Not `splitlines`: JSON allows its other line breaks, such as U+2028, inside texts, and models write them.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("The labelled replies cannot be read.", where=str(path), value=str(error)) from error
    records, waiting = [], 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            given = {name: label for name, label in content["labels"].items() if label is not None}
            waiting += len(content["labels"]) - len(given)
            records.append(read_label(content | {"labels": given}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                "A line is no labelled reply.",
                where=f"{path}, line {number}",
                value=f"{type(error).__name__}: {error}",
                remedy="a label is pass, fail or, where nobody has read the reply yet, null",
            ) from error
    return Sheet([record for record in records if record.labels], waiting)


def compare_with_reader(
    records: Sequence[LabelledReply], overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, AgainstReader]:
    """Every check that has labels, beside the reader.

    Args:
        records: Labelled replies.
        overrides: Check to parameters that replace those of the lines: another judge on the same labels.

    Raises:
        UserError: A check that does not exist, or parameters that it does not take; overrides of one without labels.
    """
    labelled = sorted({name for record in records for name in record.labels})
    if idle := [name for name, params in (overrides or {}).items() if params and name not in labelled]:
        raise UserError(f"No label is of the check {idle[0]!r}.", value=f"labels are of {', '.join(labelled)}")
    tasks = []
    for record in records:
        for name in record.labels:
            try:
                bound = bind(name, record.params.get(name, {}) | dict((overrides or {}).get(name, {})))
            except ValueError as error:
                raise UserError(
                    "A label names a check that cannot judge.", where=record.id, value=str(error)
                ) from error
            tasks.append((record, name, bound))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        verdicts = list(pool.map(lambda task: _verdict(task[2], task[0].reply), tasks))
    found: dict[str, list[tuple[LabelledReply, bool | str]]] = {}
    for (record, name, _), verdict in zip(tasks, verdicts, strict=True):
        found.setdefault(name, []).append((record, verdict))
    return {name: _against(name, rows) for name, rows in sorted(found.items())}


def _verdict(check: BoundCheck, reply: Reply) -> bool | str:
    """Whether the reply passes, or why the check cannot say."""
    try:
        return check(reply).passed
    except CheckError as error:
        return str(error)


def _against(name: str, rows: Sequence[tuple[LabelledReply, bool | str]]) -> AgainstReader:
    judged = [(record.id, record.labels[name], verdict) for record, verdict in rows if isinstance(verdict, bool)]
    pairs = [(verdict, label == "pass") for _, label, verdict in judged]
    return AgainstReader(
        quality_of(name, judged),
        share(sum(mine == readers for mine, readers in pairs), len(pairs)),
        agreement(pairs) if pairs else None,
        {record.id: verdict for record, verdict in rows if isinstance(verdict, str)},
    )
