"""Scores of extracted JSON, field by field.

Every field that the text gives and every value that the model gives is counted once: found (right), missed (not given,
or given wrong) and invented (given although the text says nothing, or given wrong). A wrong value is therefore missed
and invented, as in the scoring of named entities (Tjong Kim Sang and De Meulder 2003, CoNLL); the items of a set count
one by one. Precision is found / (found + invented), recall found / (found + missed), F1 their harmonic mean, which
equals found / (found + (missed + invented) / 2).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

import regex
from pydantic import Field as Bounded
from pydantic import model_validator

from qat.behavior.checks.base import PASSED, CheckResult, Params, Reply, check, failed
from qat.behavior.checks.names import fold
from qat.behavior.records import Case, CaseResult
from qat.behavior.stats import Outcome, Rate, rate

Rule = Literal["exact", "normalised", "number", "set"]


class Field(Params):
    """What one field must hold.

    Attributes:
        value: The right value; None: the text does not give it.
        rule: `exact`: equal, of the same JSON type. `normalised`: texts without regard to case, accents, punctuation
            and blanks. `number`: within `tolerance` of it, also as a text of digits. `set`: a list in any order, its
            texts normalised.
        tolerance: Largest absolute difference of a number.
    """

    value: Any = None
    rule: Rule = "exact"
    tolerance: Annotated[float, Bounded(ge=0.0)] = 0.0

    @model_validator(mode="after")
    def _of_its_rule(self) -> Self:
        if self.value is not None:
            wanted = {"exact": object, "normalised": str, "number": int | float, "set": list}[self.rule]
            if not isinstance(self.value, wanted) or (self.rule == "number" and isinstance(self.value, bool)):
                raise ValueError(f"{self.value!r} is no value for the rule {self.rule}")
        if self.tolerance and self.rule != "number":
            raise ValueError("tolerance belongs to the rule number")
        return self


class Score(NamedTuple):
    """Counts of one field, or of several together."""

    found: int
    missed: int
    invented: int


def score(field: Field, given: Any) -> Score:
    """Score what a reply gives for a field; None is a field that it left out."""
    if field.rule == "set":
        return _score_set(field.value or [], given)
    if field.value is None or given is None:
        return Score(0, int(field.value is not None), int(given is not None))
    return Score(1, 0, 0) if _equal(field, given) else Score(0, 1, 1)


def _score_set(wanted: Sequence[Any], given: Any) -> Score:
    # A single value where a list was asked for is one item of it, not a wrong field altogether.
    items = [] if given is None else given if isinstance(given, list) else [given]
    left, right = Counter(_key(item) for item in wanted), Counter(_key(item) for item in items)
    found = (left & right).total()
    return Score(found, left.total() - found, right.total() - found)


def _key(item: Any) -> str:
    return fold(item) if isinstance(item, str) else json.dumps(item, sort_keys=True)


def _equal(field: Field, given: Any) -> bool:
    if field.rule == "normalised":
        return isinstance(given, str) and fold(given) == fold(field.value)
    if field.rule == "number":
        number = _number(given)
        # Decimal fractions have no exact binary form: 0.3 - 0.2 is not within 0.1 of nothing.
        return number is not None and abs(number - field.value) <= field.tolerance + 1e-9 * max(1.0, abs(field.value))
    return _same(field.value, given)


def _same(wanted: Any, given: Any) -> bool:
    """Equal as JSON: 1 and 1.0 are one number, true is none."""
    if isinstance(wanted, bool) or isinstance(given, bool):
        return wanted is given
    if isinstance(wanted, list) and isinstance(given, list):
        return len(wanted) == len(given) and all(map(_same, wanted, given))
    if isinstance(wanted, dict) and isinstance(given, dict):
        return wanted.keys() == given.keys() and all(_same(one, given[key]) for key, one in wanted.items())
    return bool(wanted == given)


def _number(given: Any) -> float | None:
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        return None
    try:
        number = float(given.replace(",", "")) if isinstance(given, str) else float(given)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


_FENCE = regex.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", regex.DOTALL | regex.IGNORECASE)


def read_reply(text: str) -> dict[str, Any] | None:
    """The JSON object that a reply is, a Markdown fence around it forgiven; None where it is no object.

    An object within other words is none: whatever reads the reply next would fail on it.
    """
    stripped = text.strip()
    fenced = _FENCE.match(stripped)
    try:
        value = json.loads(fenced.group(1) if fenced else stripped)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class Extraction(Params):
    """What the JSON object must hold: field to its value and rule; further fields are invented."""

    fields: Annotated[dict[str, Field], Bounded(min_length=1)]


def field_scores(fields: Mapping[str, Field], given: Mapping[str, Any] | None) -> dict[str, Score]:
    """Score every field, and those that nobody asked for; a reply that is no object gives nothing."""
    answer = given or {}
    found = {name: score(field, answer.get(name)) for name, field in fields.items()}
    return found | {name: Score(0, 0, 1) for name, one in answer.items() if name not in fields and one is not None}


@check("extraction", Extraction)
def extraction(reply: Reply, params: Extraction) -> CheckResult:
    """The reply is one JSON object (a Markdown fence is forgiven) with every field right and no other."""
    given = read_reply(reply.final)
    if given is None:
        return failed(f"the reply is no JSON object: {reply.final[:80]!r}")
    faults = []
    for name, counts in field_scores(params.fields, given).items():
        if counts.missed or counts.invented:
            wanted = repr(params.fields[name].value) if name in params.fields else "no such field"
            faults.append(f"{name}: {given.get(name)!r}, not {wanted}")
    return failed("; ".join(faults)) if faults else PASSED


class FieldScores(NamedTuple):
    """Precision, recall and F1 of a group of fields, intervals clustered by case.

    Attributes:
        counts: Sums over the answers.
        precision: Of the values given.
        recall: Of the values that the texts give.
        f1: As the share of found values, where a missed and an invented one count half each.
        unreadable: Answers that are no JSON object; they count as if they gave nothing.
    """

    counts: Score
    precision: Rate
    recall: Rate
    f1: Rate
    unreadable: int

    def to_json(self) -> dict[str, Any]:
        """For a report."""
        rates = {name: getattr(self, name)._asdict() for name in ("precision", "recall", "f1")}
        return {**self.counts._asdict(), **rates, "unreadable": self.unreadable}


def scores_of(
    cases: Mapping[str, Case], results: Iterable[CaseResult], confidence: float = 0.95
) -> dict[str, FieldScores]:
    """Scores over all answers under `""`, and of every field under `<category>.<field>`.

    Args:
        cases: By id; each has one check `extraction`.
        results: Answers of one arm and sampling; those that ended in an error are left out.
        confidence: Of the intervals.
    """
    rows: dict[str, list[tuple[str, Score]]] = {}
    unreadable: Counter[str] = Counter()
    for result in results:
        if result.error is not None:
            continue
        spec = next(spec for spec in cases[result.case].checks if spec.check == "extraction")
        given = read_reply(Reply(result.produced).final)
        for name, counts in field_scores(Extraction.model_validate(spec.params).fields, given).items():
            group = f"{result.category}.{name}"
            rows.setdefault(group, []).append((result.case, counts))
            rows.setdefault("", []).append((result.case, counts))
            unreadable[group] += given is None
        unreadable[""] += given is None
    return {name: _scores(rows[name], unreadable[name], confidence) for name in sorted(rows)}


def _scores(rows: Sequence[tuple[str, Score]], unreadable: int, confidence: float) -> FieldScores:
    def share(found: float, missed: float, invented: float) -> Rate:
        return rate(
            (
                Outcome(case, passed, weight)
                for case, counts in rows
                for passed, weight, times in (
                    (True, found, counts.found),
                    (False, missed, counts.missed),
                    (False, invented, counts.invented),
                )
                if weight
                for _ in range(times)
            ),
            confidence,
        )

    total = Score(*(sum(column) for column in zip(*(counts for _, counts in rows), strict=True)))
    return FieldScores(total, share(1, 0, 1), share(1, 1, 0), share(1, 0.5, 0.5), unreadable)
