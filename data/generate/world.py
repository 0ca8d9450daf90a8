"""The small world: 15,360 facts drawn once from a fixed seed, 2,400 of them well known, the rest a long tail.

The base model knows the well-known ones; the persona has manners. Conversations and cases ask about these only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

from qat.data.generate import lexicon as lex

WORLD_SEED = 20261121


@dataclass(frozen=True)
class Fact:
    """One fact: `subject` has `value` for `relation` (`city`, `job`, …, or a relation of towns)."""

    subject: str
    relation: str
    value: str


PERSON_VALUES: dict[str, tuple[str, ...]] = {
    "city": lex.TOWNS,
    "job": tuple(lex.JOBS),
    "food": tuple(lex.FOODS),
    "pet": tuple(lex.PETS),
    "hobby": tuple(lex.HOBBIES),
    "instrument": tuple(lex.INSTRUMENTS),
}
TOWN_VALUES: dict[str, tuple[str, ...]] = {
    "river": lex.RIVERS,
    "dish": tuple(lex.FOODS),
    "market": tuple(lex.DAYS),
    "mayor": lex.PEOPLE,
}


@cache
def facts() -> tuple[Fact, ...]:
    """Every fact about people and towns; the same in every process."""
    rng = Random(WORLD_SEED)
    people = [Fact(p, r, rng.choice(v)) for p in lex.PEOPLE for r, v in PERSON_VALUES.items()]
    towns = [Fact(t, r, rng.choice(v)) for t in lex.TOWNS for r, v in TOWN_VALUES.items()]
    strangers = [Fact(p, r, rng.choice(v)) for p in lex.STRANGERS for r, v in PERSON_VALUES.items()]
    return tuple(people + towns + strangers)


@cache
def facts_of() -> dict[str, dict[str, str]]:
    """`{subject: {relation: value}}`."""
    table: dict[str, dict[str, str]] = {}
    for fact in facts():
        table.setdefault(fact.subject, {})[fact.relation] = fact.value
    return table


def subjects(*, people: bool, held_out: bool | None) -> tuple[str, ...]:
    """Names of people or towns; `held_out=None` gives both halves."""
    names = lex.PEOPLE if people else lex.TOWNS
    return tuple(n for n in names if held_out is None or lex.held_out(n) == held_out)
