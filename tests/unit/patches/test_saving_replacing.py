"""Replaced functions: several around one, taken out in any order."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from qat.patches.replacing import replace


class Library:
    def method(self, value: str) -> str:
        return f"{self.sign}{value}"

    @staticmethod
    def static(value: str) -> str:
        return value

    @classmethod
    def of_class(cls, value: str) -> str:
        return f"{cls.__name__}{value}"

    sign = "m"


def adding(letter: str) -> Any:
    return lambda original, *args, **kwargs: original(*args, **kwargs) + letter


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_three_replacements_leave_in_any_order(order: tuple[int, ...]) -> None:
    def function(value: str) -> str:
        return value

    module = SimpleNamespace(function=function)
    restores = [replace(module, "function", adding(letter)) for letter in "abc"]
    assert module.function("-") == "-abc"
    left = dict(enumerate("abc"))
    for number in order:
        restores[number]()
        restores[number]()
        del left[number]
        assert module.function("-") == "-" + "".join(left.values())


def test_the_last_one_out_leaves_the_function_itself() -> None:
    before = Library.__dict__["method"]
    restores = [replace(Library, "method", adding(letter)) for letter in "ab"]
    for restore in reversed(restores):
        restore()
    assert Library.__dict__["method"] is before


@pytest.mark.parametrize(("name", "expected"), [("method", "mx!"), ("static", "x!"), ("of_class", "Libraryx!")])
def test_kinds_of_methods(name: str, expected: str) -> None:
    kind = type(Library.__dict__[name])
    restore = replace(Library, name, adding("!"))
    assert type(Library.__dict__[name]) is kind
    assert getattr(Library(), name)("x") == expected
    restore()
    assert getattr(Library(), name)("x") == expected[:-1]
