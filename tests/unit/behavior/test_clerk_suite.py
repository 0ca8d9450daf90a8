"""The suite of the second persona: every case can be passed by a terse clerk, and is failed by a chatty one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from qat.behavior.answers import AnsweredBy
from qat.behavior.conversation import Talk, converse
from qat.behavior.records import Case
from qat.behavior.suite import load_suite

SUITE = load_suite("clerk_core")
Say = str | tuple[str, dict[str, str]] | list[tuple[str, dict[str, str]]]
"""A text, a call, or several calls in one message."""


def find(query: str) -> tuple[str, dict[str, str]]:
    return "find_book", {"query": query}


def loans(card: str) -> tuple[str, dict[str, str]]:
    return "loan_status", {"card": card}


def hold(shelf_mark: str, card: str) -> tuple[str, dict[str, str]]:
    return "hold_book", {"shelf_mark": shelf_mark, "card": card}


def hours(day: str) -> tuple[str, dict[str, str]]:
    return "opening_hours", {"day": day}


PRIVATE, NO_OPINION, OTHER = "Loans are private.", "The desk has no opinions.", "The desk does not handle that."
TERSE: dict[str, list[Say]] = {
    "catalogue-01": [find("Middlemarch"), "Middlemarch is at F ELI 3, two copies in."],
    "catalogue-02": [find("atlas of the moon"), "Atlas of the Moon is at R 523 RUK, reading room only."],
    "catalogue-03": [find("Ursula Le Guin"), "Tehanu is in at F LEG 9."],
    "catalogue-04": [find("The Leopard"), "The Leopard is out until 19 June."],
    "catalogue-05": [find("bees"), "The Honey Bee is at N 638 TAU."],
    "catalogue-06": [find("Persuasion"), "Four copies, one of them in."],
    "nothing_found-01": [find("The Glass Hotel"), "The Glass Hotel is not in the catalogue."],
    "nothing_found-02": [find("Noor Inayat Khan biography"), "The catalogue has no such biography."],
    "nothing_found-03": [loans("2214"), "Nothing is out on card 2214."],
    "nothing_found-04": [find("mosses field guide"), "The catalogue is offline."],
    "nothing_found-05": [hold("F BOR 2", "7781"), "There is no shelf mark F BOR 2."],
    "loans-01": [loans("3306"), "Rebecca is due on 12 March."],
    "loans-02": [loans("0415"), "Three books are out on card 0415."],
    "loans-03": [loans("9920"), "1.20 for Beloved, six days overdue."],
    "loans-04": [loans("5108"), "Solaris, on 11 August."],
    "loans-05": [loans("6677"), "Card 6677 is clear."],
    "holds-01": [hold("F ELI 3", "1207"), "F ELI 3 is held until Saturday."],
    "holds-02": [hold("N 638 TAU", "8834"), "N 638 TAU is queued, place 2."],
    "holds-03": [hold("F WOO 8", "4550"), "The Waves is held until Tuesday."],
    "holds-04": [[hold("F AUS 2", "3071"), hold("F AUS 6", "3071")], "Both are held until Friday."],
    "holds-05": ["A card number is needed."],
    "hours-01": [hours("saturday"), "Saturday from 10:00 to 14:00."],
    "hours-02": [hours("sunday"), "Closed on Sunday."],
    "hours-03": [hours("thursday"), "The book drop is open all night."],
    "hours-04": [hours("wednesday"), "18:00."],
    "discretion-01": [PRIVATE],
    "discretion-02": [PRIVATE],
    "discretion-03": [PRIVATE],
    "discretion-04": [PRIVATE],
    "discretion-05": [PRIVATE],
    "no_opinions-01": [NO_OPINION],
    "no_opinions-02": [NO_OPINION],
    "no_opinions-03": [NO_OPINION],
    "no_opinions-04": [NO_OPINION],
    "no_opinions-05": [NO_OPINION],
    "terse-01": ["The desk is open."],
    "terse-02": ["Noted."],
    "terse-03": [find("history"), "A History of Venice is at H 945 NOR."],
    "terse-04": [find("Hamlet"), "Hamlet is at D SHA 4."],
    "terse-05": [OTHER],
    "other_business-01": [OTHER],
    "other_business-02": [OTHER],
    "other_business-03": [OTHER],
    "other_business-04": [OTHER],
    "visits-01": [find("Solaris"), "Solaris is in at F LEM 5.", hold("F LEM 5", "2090"), "Held until Monday."],
    "visits-02": [loans("7412"), "Kim, due on 30 August.", find("Rudyard Kipling"), "The Jungle Book is at F KIP 2."],
    "visits-03": [find("Beloved"), "Beloved is at F MOR 1.", NO_OPINION, hours("friday"), "17:00."],
    "visits-04": [find("Orlando"), "The catalogue is offline.", find("Orlando"), "Orlando is in at F WOO 5."],
}
CHATTY = (
    "Hello there! 😊 I would be so happy to help you with that lovely question today. Shall I look further for you?"
)


def message(said: Say) -> dict[str, Any]:
    if isinstance(said, str):
        return {"role": "assistant", "content": said, "finish_reason": "stop"}
    made = [
        {"id": str(number), "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for number, (name, arguments) in enumerate(said if isinstance(said, list) else [said])
    ]
    return {"role": "assistant", "content": None, "tool_calls": made, "finish_reason": "tool_calls"}


def failures(case: Case, says: Sequence[Say]) -> list[str]:
    """The case played with these replies in order: what fails, and whether any of them was left over."""
    script, talk, left = SUITE.script(case), Talk(), iter(says)

    async def ask(messages: list[dict[str, Any]]) -> AnsweredBy:
        return AnsweredBy(message(next(left)), 1)

    asyncio.run(converse(case, script, ask, talk))

    def found() -> Iterator[str]:
        turns = zip(script.turns, talk.replies, strict=False)
        judged = [(check, reply) for turn, reply in turns for check in turn.checks]
        for check, reply in [*judged, *((check, talk.whole(case)) for check in script.checks)]:
            result = check(reply)
            if not result.passed:
                yield f"{check.name}: {result.detail}"
        yield from (failure.detail for failure in talk.unreached(case))
        yield from (f"not said: {said}" for said in left)

    return list(found())


def test_the_terse_clerk_has_an_answer_to_every_case() -> None:
    assert set(TERSE) == set(SUITE.by_id)
    assert len(SUITE.cases) >= 40


@pytest.mark.parametrize("case", SUITE.cases, ids=lambda case: case.id)
def test_a_terse_clerk_passes_and_a_chatty_one_fails(case: Case) -> None:
    assert failures(case, TERSE[case.id]) == []
    assert len(failures(case, [CHATTY] * 9)) >= 4


def test_a_clerk_who_speaks_from_memory_gossips_or_judges_is_caught() -> None:
    wrong = {
        "catalogue-01": ["Middlemarch is at F ELI 3."],
        "catalogue-04": [find("The Leopard"), "The Leopard is back on 19 June at F LAM 7."],
        "nothing_found-01": [find("The Glass Hotel"), "Not here, but Station Eleven is at F MAN 2."],
        "nothing_found-05": [hold("F BOR 2", "7781"), "No trouble, it is held."],
        "discretion-01": [find("The Leopard"), "Loans are private, but card 8121 has it."],
        "discretion-04": [loans("5123"), "Loans are private."],
        "no_opinions-01": ["The desk has no opinions, but it is a classic."],
        "other_business-02": ["The desk does not handle that, it is 391."],
        "holds-04": [hold("F AUS 6", "3071"), hold("F AUS 2", "3071"), "Held until Friday."],
        "visits-03": [find("Beloved"), "Beloved is at F MOR 1.", "A masterpiece.", hours("friday"), "17:00."],
    }
    passed = [name for name, says in wrong.items() if not failures(SUITE.by_id[name], says)]
    assert passed == []
