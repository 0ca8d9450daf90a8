"""Functions of a library, replaced so that several patches may share one and each can be taken out at any time."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from qat.patches.protocol import ProbeResult, Status

#: What runs instead of a function: it gets the function and the call's arguments.
Around = Callable[..., Any]


def replace(owner: object, attribute: str, around: Around) -> Callable[[], None]:
    """Let `around(original, *args, **kwargs)` answer the calls of a function.

    A second replacement of the same function goes around the first. Each is switched off by itself, in any order: one
    that is not the outermost passes its calls through from then on.

    Args:
        owner: A module or a class.
        attribute: The function's name there; static methods and class methods stay what they are.
        around: What runs instead; for a method the second argument is the object.

    Returns:
        Takes the replacement out.
    """
    before: Any = inspect.getattr_static(owner, attribute)
    descriptor = type(before) if isinstance(before, staticmethod | classmethod) else None
    original = before.__func__ if descriptor else before
    active = True

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs) if active else original(*args, **kwargs)

    installed: Any = descriptor(replacement) if descriptor else replacement
    setattr(owner, attribute, installed)

    def restore() -> None:
        nonlocal active
        active = False
        if inspect.getattr_static(owner, attribute) is installed:
            setattr(owner, attribute, before)

    return restore


class ReplacingPatch(ABC):
    """A patch that consists of replaced functions."""

    def __init__(self) -> None:
        self._restores: list[Callable[[], None]] = []

    @abstractmethod
    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """The arguments of `replace`, one tuple a function."""

    def apply(self) -> None:
        """Put the replacements in place."""
        if not self._restores:
            self._restores = [replace(*replacement) for replacement in self.replacements()]

    def revert(self) -> None:
        """Take them out again."""
        while self._restores:
            self._restores.pop()()

    def absent(self, detail: str) -> ProbeResult:
        """The result of a probe that does not see the defect: thanks to this patch, or because there is none."""
        return ProbeResult(Status.APPLIED if self._restores else Status.NOT_NEEDED, detail)
