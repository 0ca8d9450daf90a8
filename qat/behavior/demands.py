"""What a suite demands of every reply, whatever the case asks: what training replies can be held to.

A check belongs here where at least four of five cases of a suite make it with the same parameters: manners, length,
leaks. What a single case wants to hear, whether a call was due in it, and what only a live server shows (latency, a
judge) stays with the cases.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from qat.behavior.checks import BoundCheck, CheckError, Reply, bind
from qat.behavior.checks.language import likely_language, scripts_beside
from qat.behavior.checks.speech import words
from qat.behavior.records import Case
from qat.behavior.suite import Suite

COMMON_FROM = 0.8
"""Share of a suite's cases that must make a check before it is demanded of training replies."""

_OF_THE_CASE = frozenset(("calls", "parallel_calls", "no_call"))
"""Whether a call is due depends on the question."""
_OF_THE_SERVER = frozenset(("max_latency", "max_first_token", "finished"))


class Demands(NamedTuple):
    """The checks that every reply must pass.

    Attributes:
        suites: Where they come from, by name.
        checks: Name and parameters of each, as JSON: plain values, so that another process can take them.
        left_out: Checks of as many cases that no recorded reply can be held to.
        turns: What the suites' users say where the model answers, case by case, as (case, text): the questions that
            training must not know.
        references: The cases' reference answers, as (case, text): what training replies must not repeat.
    """

    suites: tuple[str, ...]
    checks: tuple[tuple[str, str], ...]
    left_out: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    references: tuple[tuple[str, str], ...] = ()

    def judge(
        self,
        produced: Sequence[Mapping[str, Any]],
        context: Sequence[Mapping[str, Any]],
        tool_results: Sequence[str],
        tools: Sequence[Mapping[str, Any]],
    ) -> list[tuple[str, str]]:
        """Hold one reply against the checks.

        Args:
            produced: The assistant's messages from the user's turn to the next.
            context: The messages before, system message first.
            tool_results: What the tools returned within the reply.
            tools: The tools offered.

        Returns:
            Name and finding of every check that the reply fails.
        """
        reply = Reply(produced, context, tool_results, tools)
        failures = []
        for name, params in self.checks:
            try:
                passed, detail = _bound(name, params)(reply)
            except CheckError as error:
                passed, detail = False, f"could not be judged: {error}"
            if not passed:
                failures.append((name, detail))
        return failures

    def language(self, text: str) -> str | None:
        """The language that most of a text is likely in (ISO 639-1), with further scripts (`kn+Latin`), or None."""
        code = likely_language(text)
        return None if code is None else "+".join((code, *scripts_beside(text)))

    def words(self, text: str) -> int:
        """Words of a text, as `max_words` counts them."""
        return len(words(text))


@lru_cache(maxsize=256)
def _bound(name: str, params: str) -> BoundCheck:
    return bind(name, json.loads(params))


def demands_of(suites: Sequence[Suite]) -> Demands:
    """What these suites demand of every reply, and what they ask."""
    checks: dict[tuple[str, str], None] = {}
    left_out: dict[str, None] = {}
    turns: list[tuple[str, str]] = []
    for suite in suites:
        for name, params in _common(suite):
            if name in _OF_THE_CASE:
                continue
            if name in _OF_THE_SERVER or _bound(name, params).waits:
                left_out[name] = None
            else:
                checks[name, params] = None
        for case in suite.cases:
            given = [m["content"] for m in case.messages if m["role"] == "user" and isinstance(m["content"], str)]
            asked = [turn.user for turn in case.turns] or given[-1:]
            turns += [(case.id, text) for text in asked]
    answers = tuple((case.id, text) for suite in suites for case in suite.cases for text in _references(case))
    return Demands(tuple(suite.name for suite in suites), tuple(checks), tuple(left_out), tuple(turns), answers)


def _references(case: Case) -> list[str]:
    """The answers that a reply to this case is compared with: the case's own, and those of its judges."""
    specs = [*case.checks, *(spec for turn in case.turns for spec in turn.checks)]
    found = [case.reference, *(spec.params.get("reference") for spec in specs if spec.check == "judge")]
    return [text for text in found if isinstance(text, str) and text]


def _common(suite: Suite) -> list[tuple[str, str]]:
    count: Counter[tuple[str, str]] = Counter()
    for case in suite.cases:
        specs = [*case.checks, *(spec for turn in case.turns for spec in turn.checks)]
        made = ((spec.check, json.dumps(spec.params, sort_keys=True, ensure_ascii=False)) for spec in specs)
        count.update(list(dict.fromkeys(made)))  # each once a case
    return [key for key, cases in count.items() if cases >= COMMON_FROM * len(suite.cases)]
