"""How good the checks are: precision and recall against replies that were labelled by reading them.

The labels (`labels/*.jsonl`, described in `labels/README.md`) are split in two halves by a hash of the reply: checks
are written and repaired on one, and only the other, which nobody looks at while doing so, says how good they are. A
check finds faults, so a reply that fails is the positive case: recall is the share of faulty replies that the check
fails, precision the share of failed replies that are faulty.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qat.behavior.checks import Reply, bind
from qat.behavior.checks.speech import sentences, words
from qat.behavior.stats import Interval, quantile, wilson
from qat.data.schema import Persona, load_persona
from qat.errors import UserError

LABELS = Path(__file__).resolve().parent / "labels"
WRITTEN = "written for this set"
"""The source of replies that no model gave."""
Label = Literal["pass", "fail"]
Half = Literal["development", "held_out"]


class LabelledReply(NamedTuple):
    """One reply with the reader's verdicts.

    Attributes:
        id: `<file>-<number>`.
        source: Where the reply is from, to the row.
        licence: SPDX name.
        half: Which half of the labels it belongs to.
        reply: As a check sees it.
        labels: Check to verdict; a check on which a careful reader may differ is left out.
        params: Parameters of the checks that take any.
        counts: `sentences` and `words` as the reader counts them, where counted.
    """

    id: str
    source: str
    licence: str
    half: Half
    reply: Reply
    labels: dict[str, Label]
    params: dict[str, dict[str, Any]]
    counts: dict[str, int]


def half_of(reply: dict[str, Any] | list[dict[str, Any]]) -> Half:
    """The half of a reply: parity of the SHA-256 of its canonical JSON, so that equal replies fall into one half."""
    digest = hashlib.sha256(json.dumps(reply, sort_keys=True, ensure_ascii=False).encode()).digest()
    return "held_out" if digest[-1] % 2 else "development"


def load_labels(folder: Path = LABELS) -> list[LabelledReply]:
    """Read every label file of a folder.

    Raises:
        UserError: No files, or a line that is no labelled reply.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError("There are no labelled replies.", where=str(folder))
    found: list[LabelledReply] = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                found.append(read_label(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                what = f"{type(error).__name__}: {error}"
                raise UserError("A line is no labelled reply.", where=f"{path}, line {number}", value=what) from error
    return found


@cache
def _persona(name: str) -> Persona:
    return load_persona(name)


def read_label(record: dict[str, Any]) -> LabelledReply:
    """One line of a label file; `produced`, a list of messages, may stand in the place of a single `reply`.

    `times` holds the seconds that were measured, by the names that `Reply` has for them.

    Raises:
        ValueError: A label is neither pass nor fail.
        KeyError: A key is missing.
        TypeError: A value is of another kind.
    """
    context = record["context"]
    messages, tools = list(context.get("messages", ())), context.get("tools", [])
    if "persona" in context:
        persona = _persona(context["persona"])
        messages = [{"role": "system", "content": persona.system_prompt}, *messages]
        tools = tools or persona.tools
    if strange := set(record["labels"].values()) - {"pass", "fail"}:
        raise ValueError(f"label {strange.pop()!r}")
    produced = record["produced"] if "produced" in record else [record["reply"]]
    return LabelledReply(
        record["id"],
        record["source"],
        record["licence"],
        half_of(record.get("reply", produced)),
        Reply(
            [{"role": "assistant", **message} for message in produced],
            messages,
            tuple(context.get("tool_results", ())),
            tools,
            **record.get("times", {}),
        ),
        record["labels"],
        record.get("params", {}),
        record.get("counts", {}),
    )


class Share(NamedTuple):
    """A share with its 95 % Wilson interval; all None where there is nothing to divide by."""

    value: float | None
    low: float | None
    high: float | None


class Quality(NamedTuple):
    """One check against the labels.

    Attributes:
        check: Its name.
        n: Labelled replies.
        faulty: Those that the reader fails.
        missed: Ids of faulty replies that the check passes.
        false_alarms: Ids of sound replies that the check fails.
        precision: Of what the check fails, the share that is faulty.
        recall: Of what is faulty, the share that the check fails.
    """

    check: str
    n: int
    faulty: int
    missed: list[str]
    false_alarms: list[str]
    precision: Share
    recall: Share


def share(part: int, whole: int) -> Share:
    """`part` of `whole` with its interval."""
    if not whole:
        return Share(None, None, None)
    low, high = wilson(part / whole, whole, 0.95)
    return Share(part / whole, low, high)


def measure(records: Iterable[LabelledReply]) -> list[Quality]:
    """Precision and recall of every check that has labels among the records, by name."""
    verdicts: dict[str, list[tuple[str, Label, bool]]] = {}
    for record in records:
        for name, label in record.labels.items():
            passed = bind(name, record.params.get(name, {}))(record.reply).passed
            verdicts.setdefault(name, []).append((record.id, label, passed))
    return [quality_of(name, rows) for name, rows in sorted(verdicts.items())]


def quality_of(name: str, rows: Sequence[tuple[str, Label, bool]]) -> Quality:
    """Precision and recall of one check, from (id, the reader's label, whether the check passes the reply)."""
    faulty = sum(label == "fail" for _, label, _ in rows)
    missed = [id for id, label, passed in rows if label == "fail" and passed]
    false_alarms = [id for id, label, passed in rows if label == "pass" and not passed]
    found = faulty - len(missed)
    return Quality(
        name, len(rows), faulty, missed, false_alarms, share(found, found + len(false_alarms)), share(found, faulty)
    )


class Agreement(NamedTuple):
    """How far two raters agree beyond chance.

    Attributes:
        n: Replies that both judged.
        observed: Share of equal verdicts.
        kappa: Cohen's kappa; None where both gave one and the same verdict throughout, which leaves chance nothing.
        interval: 95 % of kappa; None also where its standard error is zero: that fifty of fifty verdicts are equal does
            not say that all will be.
    """

    n: int
    observed: float
    kappa: float | None
    interval: Interval | None


def agreement(pairs: Sequence[tuple[bool, bool]]) -> Agreement:
    """Cohen's kappa of two raters' verdicts, say a judge's and a reader's.

    The standard error is the large-sample one of Fleiss, Cohen and Everitt (1969), Psychological Bulletin 72, formula
    13, for two categories.

    Raises:
        ValueError: No pairs.
    """
    n = len(pairs)
    if not n:
        raise ValueError("no verdicts to compare")
    cell = {(a, b): sum(pair == (a, b) for pair in pairs) / n for a in (True, False) for b in (True, False)}
    row = {a: cell[a, True] + cell[a, False] for a in (True, False)}
    column = {b: cell[True, b] + cell[False, b] for b in (True, False)}
    observed = cell[True, True] + cell[False, False]
    chance = sum(row[a] * column[a] for a in (True, False))
    if chance == 1:
        return Agreement(n, observed, None, None)
    kappa = (observed - chance) / (1 - chance)
    same = sum(cell[a, a] * (1 - (row[a] + column[a]) * (1 - kappa)) ** 2 for a in (True, False))
    other = (1 - kappa) ** 2 * sum(cell[a, not a] * (column[a] + row[not a]) ** 2 for a in (True, False))
    variance = (same + other - (kappa - chance * (1 - kappa)) ** 2) / (n * (1 - chance) ** 2)
    if variance <= 1e-12:
        return Agreement(n, observed, kappa, None)
    reach = quantile(0.95) * math.sqrt(variance)
    return Agreement(n, observed, kappa, Interval(max(-1.0, kappa - reach), min(1.0, kappa + reach)))


def results(records: Sequence[LabelledReply]) -> dict[str, Any]:
    """What `docs/benchmarks/checks.json` holds: the make-up of the labels, and the quality on either half."""
    return {
        "replies": {
            half: {
                "n": len(mine),
                "published": sum(not _ours(record) for record in mine),
                "written": sum(record.source == WRITTEN for record in mine),
            }
            for half in ("held_out", "development")
            if (mine := [record for record in records if record.half == half])
        },
        "checks": {
            half: [_row(quality, mine) for quality in measure(mine)]
            for half in ("held_out", "development")
            if (mine := [record for record in records if record.half == half])
        },
        "counts": {
            half: counts_right([record for record in records if record.half == half])
            for half in ("held_out", "development")
        },
    }


def _ours(record: LabelledReply) -> bool:
    return record.source == WRITTEN or record.source.startswith("qat,")


def _row(quality: Quality, records: Iterable[LabelledReply]) -> dict[str, Any]:
    """A check's quality as JSON, with the part of the published replies in it."""
    published = {record.id for record in records if not _ours(record) and quality.check in record.labels}
    faulty = sum(record.labels.get(quality.check) == "fail" for record in records if record.id in published)
    wrong = published & {*quality.missed, *quality.false_alarms}
    share_of = {name: getattr(quality, name)._asdict() for name in ("precision", "recall")}
    return quality._asdict() | share_of | {"published": {"n": len(published), "faulty": faulty, "wrong": len(wrong)}}


def counts_right(records: Iterable[LabelledReply]) -> dict[str, dict[str, int]]:
    """How often sentences and words are counted as the reader counts them."""
    counters: dict[str, Callable[[str], Sequence[str]]] = {"sentences": sentences, "words": words}
    found = {name: {"n": 0, "exact": 0} for name in counters}
    for record in records:
        for name, count in record.counts.items():
            found[name]["n"] += 1
            found[name]["exact"] += len(counters[name](record.reply.final)) == count
    return found


def page(found: dict[str, Any]) -> str:
    """The Markdown page of `results`."""
    lines = [_HEAD.format(**_facts(found))]
    for half, title in _TITLES.items():
        lines += [f"\n## {title}\n", *_TABLE_HEAD, *map(_line, found["checks"][half]), ""]
        for unit, count in found["counts"][half].items():
            lines.append(f"Counted as the reader counts: {unit} {count['exact']} of {count['n']} texts.")
    return "\n".join(lines) + "\n"


_HEAD = """# How good the checks are

*Written by `{command}`; raw numbers in [checks.json](checks.json).*

{n} replies in three rounds were labelled by reading them; how, from where and with which limits, and what the checks
were worth before the repairs that the later rounds led to, stands in
[qat/behavior/labels/README.md](../../qat/behavior/labels/README.md). {published} of them are from published data sets,
{written} were written for this set (faults that models rarely show, and sound replies that look like them, in many
languages), the others are answers of the tiny arms. Every check below has at least 40 faults and 40 sound replies. The
halves are split by a hash of the reply; the checks were repaired on one half only.

The held-out half flatters: one reader, a language model, wrote the written replies of both halves, the labels and the
checks; of the labels a second one has read 60 replies. The replies of published data sets are the harder test;
they are counted apart in the last column.

A check finds faults. Recall: of the replies that the reader fails, the share that the check fails. Precision: of the
replies that the check fails, the share that the reader fails too. In brackets 95 % Wilson intervals. Written faults are
easier and more frequent than those of a model in use: the share of faults here is no forecast, and precision depends
on it. "Published" counts replies of published data sets, faults among them, and wrong verdicts on them.
"""
_TITLES = {"held_out": "Held-out half", "development": "Development half (what the checks were repaired on)"}
_TABLE_HEAD = (
    "| check | replies | faults | precision | recall | missed | false alarms | published: n / faults / wrong |",
    "|---|---:|---:|---|---|---:|---:|---|",
)


def _facts(found: dict[str, Any]) -> dict[str, Any]:
    halves = found["replies"].values()
    totals = {key: sum(half[key] for half in halves) for key in ("n", "published", "written")}
    return totals | {"command": found["command"]}


def _line(row: dict[str, Any]) -> str:
    real = row["published"]
    return (
        f"| `{row['check']}` | {row['n']} | {row['faulty']} | {_percent(row['precision'])} | {_percent(row['recall'])} "
        f"| {len(row['missed'])} | {len(row['false_alarms'])} | {real['n']} / {real['faulty']} / {real['wrong']} |"
    )


def _percent(value: dict[str, float | None]) -> str:
    rate, low, high = value["value"], value["low"], value["high"]
    if rate is None or low is None or high is None:
        return "none to judge by"
    return f"{100 * rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
