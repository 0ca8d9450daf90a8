"""New training conversations out of what an arm got wrong: of the same kind as a failed case, with other content.

By the grammars of the small world: conversations of the training half whose shape (category, number of user turns, the
calls in order and whether each found anything) is that of the failed case. The halves share no person, town or topic,
so other names and facts are given. By a teacher: a brief for each failed case that says what went wrong and forbids the
names and numbers of its turns.

Either way no user turn may equal or nearly equal one of the suite, and nothing is added to the suite. What is trained
on its failures the suite no longer judges independently: keep cases of the same categories that were never used so.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from qat.behavior.records import Case, CaseResult, ToolScript, read_meta, read_results
from qat.behavior.suite import Suite
from qat.data.duplicates import user_turns
from qat.data.generate.conversations import conversations
from qat.data.generate.novelty import Novelty, words_of
from qat.data.schema import Conversation, Persona
from qat.errors import UserError

if TYPE_CHECKING:
    from qat.data.generate.teacher import Brief, Teacher

POOL = 400
"""Conversations drawn at once to choose from."""
MOST_POOLS = 40
_TITLE = re.compile(r"\b(Dr|Mr|Mrs|Ms|Prof|St|Sri|Smt)\.")
_SELF = re.compile(r"I(?:$|['’])")


class Failure(NamedTuple):
    """A failed case, and the checks that failed, over all samplings and seeds."""

    case: Case
    failed: dict[str, str]


class Shape(NamedTuple):
    """What two conversations of one kind share.

    Attributes:
        category: Its name.
        user_turns: How many.
        calls: (tool, whether it found nothing), in order.
    """

    category: str
    user_turns: int
    calls: tuple[tuple[str, bool], ...]


@dataclass
class AdversarialReport:
    """What was made out of which failures.

    Attributes:
        failures: Failed cases.
        checks: Failed check to the number of cases that failed it.
        wanted: Case to the number of conversations asked for.
        made: Case to the number made.
        passed_over: Reason to the conversations of the right shape that were left out.
    """

    failures: int
    checks: dict[str, int]
    wanted: dict[str, int]
    made: dict[str, int]
    passed_over: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every failed case has its count."""
        return self.made == self.wanted

    def to_json(self) -> dict[str, Any]:
        """As JSON values; of the cases only those that have less than was asked for."""
        return {
            "failures": self.failures,
            "checks": self.checks,
            "wanted": sum(self.wanted.values()),
            "made": sum(self.made.values()),
            "complete": self.complete,
            "short": {case: count for case, count in self.made.items() if count < self.wanted[case]},
            "passed_over": self.passed_over,
        }


def failures(results: Path, suite: Suite) -> list[Failure]:
    """The cases that an arm failed, in the suite's order; errors are no failures.

    Args:
        results: `behavior/<arm>.jsonl` of a run.
        suite: The suite that was asked.

    Raises:
        UserError: The results are of another suite, or hold no failure.
    """
    meta = read_meta(results)
    if meta is not None and meta.sha256 != suite.sha256:
        raise UserError(
            "The results are of another suite.",
            where=str(results),
            value=f"asked: {meta.suite} {meta.sha256[:12]}…, given: {suite.name} {suite.sha256[:12]}…",
            remedy="name the recipe of that run (--recipe)",
        )
    failed: dict[str, dict[str, str]] = defaultdict(dict)
    for result in read_results(results).results.values():
        if result.case not in suite.by_id:
            raise UserError("The results hold a case that the suite does not.", where=str(results), value=result.case)
        if not result.passed and result.error is None:
            failed[result.case] |= _checks(result)
    if not failed:
        raise UserError("No case failed: there is nothing to learn from.", where=str(results))
    return [Failure(case, failed[case.id]) for case in suite.cases if case.id in failed]


def _checks(result: CaseResult) -> dict[str, str]:
    return {check.check: check.detail for check in result.failed_checks}


def count_checks(found: Sequence[Failure]) -> dict[str, int]:
    """Failed check to the number of cases, most frequent first."""
    names = [name for failure in found for name in failure.failed]
    return {name: names.count(name) for name in sorted(set(names), key=lambda name: (-names.count(name), name))}


# By the grammars ------------------------------------------------------------------------------------------------------


def by_grammar(
    persona: Persona,
    suite: Suite,
    found: Sequence[Failure],
    per_case: int,
    seed: int,
    known: Sequence[Conversation] = (),
) -> tuple[list[Conversation], AdversarialReport]:
    """Conversations of the failed cases' shapes from the training half of the small world, deterministic by seed.

    Args:
        persona: One of the small world.
        suite: Whose user turns may not be repeated.
        found: The failures.
        per_case: Conversations for each.
        seed: Of the draw.
        known: Training data that is there already; its user turns are not repeated either.

    Returns:
        The conversations, ids `again-<case>-<number>`, and the report, whose `short` names cases of a shape that the
        grammars did not give often enough.

    Raises:
        UserError: The persona is none of the small world.
    """
    wanted = {failure.case.id: per_case for failure in found}
    open_: dict[Shape, list[str]] = defaultdict(list)
    for failure in found:
        open_[shape_of_case(failure.case)] += [failure.case.id] * per_case
    novelty = Novelty()
    novelty.take_cases(case.model_dump() for case in suite.cases)
    for each in known:
        novelty.take("the data", user_turns(each))
    report = AdversarialReport(len(found), count_checks(found), wanted, dict.fromkeys(wanted, 0))
    made: list[Conversation] = []
    for conversation in _pools(persona, seed):
        waiting = open_.get(shape_of(conversation))
        if not waiting:
            continue
        if (near := novelty.nearest(user_turns(conversation))) is not None:
            reason = "near a case of the suite" if near.source.startswith("case ") else "near other training data"
            report.passed_over[reason] = report.passed_over.get(reason, 0) + 1
            continue
        case = waiting.pop(0)
        conversation["id"] = f"again-{case}-{report.made[case]:02d}"
        report.made[case] += 1
        novelty.take(conversation["id"], user_turns(conversation))
        made.append(conversation)
        if not any(open_.values()):
            break
    return made, report


def _pools(persona: Persona, seed: int) -> Iterator[Conversation]:
    for number in range(MOST_POOLS):
        # A seed of its own: the conversations of the recipe's seeds are the ones that were trained on already.
        drawn = conversations(persona, POOL, _again(seed, number))
        yield from cast("list[Conversation]", drawn)


def _again(seed: int, number: int) -> int:
    return (seed + 1) * 1_000_003 + number


def shape_of(conversation: Mapping[str, Any]) -> Shape:
    """The shape of a whole conversation."""
    messages = conversation["messages"]
    return Shape(conversation["category"], len(user_turns(conversation)), tuple(_calls(messages)))


def shape_of_case(case: Case) -> Shape:
    """The shape of a case that goes as scripted: the calls of its prefix, then those that get results."""
    turns = [*user_turns({"messages": case.messages}), *(turn.user for turn in case.turns)]
    scripted = [case.tool_results, *(turn.tool_results for turn in case.turns)]
    ahead = [(tool, _nothing(_first(script))) for table in scripted for tool, script in table.items()]
    return Shape(case.category, len(turns), (*_calls(case.messages), *ahead))


def _calls(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bool]]:
    results = {message["tool_call_id"]: message["content"] for message in messages if message["role"] == "tool"}
    for message in messages:
        for call in message.get("tool_calls") or ():
            yield call["function"]["name"], _nothing(results.get(call["id"], ""))


def _first(script: ToolScript) -> str:
    entry = script if isinstance(script, str) else script[0]
    return entry if isinstance(entry, str) else entry.result


def _nothing(result: str) -> bool:
    """Whether a tool's result says that nothing was found."""
    return result.strip() in ("", "[]", "{}", "null")


# By a teacher ---------------------------------------------------------------------------------------------------------


def briefs(persona: Persona, found: Sequence[Failure], per_case: int, teacher: Teacher) -> list[Brief]:
    """One brief for a teacher for each failed case.

    Args:
        persona: Its prompt's own names may come again.
        found: The failures.
        per_case: Conversations for each.
        teacher: What it says of the categories.
    """
    from qat.data.generate.teacher import Brief

    made = []
    for failure in found:
        case = failure.case
        turns = [*user_turns({"messages": case.messages}), *(turn.user for turn in case.turns)]
        made.append(
            Brief(
                name=f"again-{case.id}",
                category=case.category,
                about=teacher.about(case.category),
                count=per_case,
                lesson=_lesson(turns, failure.failed),
                forbidden=names_and_numbers(turns) - _words(persona.system_prompt),
            )
        )
    return made


def _lesson(turns: Sequence[str], failed: Mapping[str, str]) -> str:
    return (
        "The assistant has failed at something like this, given as JSON; write another occasion for the same kind of "
        "mistake, with other people, places, numbers, subjects and wording: "
        + json.dumps({"user": list(turns), "failed": dict(failed)}, ensure_ascii=False)
    )


def names_and_numbers(turns: Sequence[str]) -> frozenset[str]:
    """Words of the turns that look like a name (a capital inside a sentence) or hold a digit, case folded.

    Scripts without capitals give numbers only.
    """
    found = set()
    for turn in turns:
        for sentence in re.split(r"(?<=[.!?…:])\s+", _TITLE.sub(r"\1", turn)):
            words = words_of(sentence)
            found |= {
                word for word in words[1:] if word[0].isupper() and word != "I" and not word.startswith(("I'", "I’"))
            }
            found |= {word for word in words if any(character.isdigit() for character in word)}
    return frozenset(word.casefold() for word in found)


def _words(text: str) -> frozenset[str]:
    return frozenset(word.casefold() for word in words_of(text))
