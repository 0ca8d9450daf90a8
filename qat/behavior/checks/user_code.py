"""Check by a function of the user's own.

A suite file that may run code is a program: opening somebody else's suite must not run it. So the check binds only
inside `allow_user_code()`, which a command enters for the user's own suite file and only where the user said so by a
flag; everywhere else a suite with this check is refused when it is loaded.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from qat.behavior.checks.base import PASSED, CheckError, CheckResult, Params, Reply, check, failed

_ALLOWED: ContextVar[bool] = ContextVar("user_code_allowed", default=False)


@contextmanager
def allow_user_code(folder: Path) -> Iterator[None]:
    """Let suites loaded inside bind `python` checks; modules are looked for in `folder` first, beside the suite."""
    token = _ALLOWED.set(True)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        _ALLOWED.reset(token)


class Python(Params):
    """The function, and what it is given beside the reply.

    Attributes:
        function: `module:function`; called as `function(reply, **arguments)`, where `reply` is a
            `qat.behavior.checks.Reply`. It returns True or None for a pass, False or a text (what is wrong) for a fail.
        arguments: Keyword arguments.
    """

    function: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    arguments: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _importable(self) -> Self:
        if not _ALLOWED.get():
            raise ValueError(
                f"{self.function} is code of whoever wrote the suite, and this command was not told to run it; "
                "read it, then allow it with --allow-python (pytest: --qat-allow-python)"
            )
        _load(self.function)
        return self


@lru_cache(maxsize=256)
def _load(name: str) -> Callable[..., object]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ValueError(f"{module} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"{module} has no function {attribute!r}")
    return function  # type: ignore[no-any-return]


@check("python", Python, waits=True)
def python(reply: Reply, params: Python) -> CheckResult:
    """The user's function finds nothing wrong.

    Raises:
        CheckError: The function raised, or returned something that is neither a truth value nor a text.
    """
    try:
        verdict = _load(params.function)(reply, **params.arguments)
    except Exception as error:
        raise CheckError(f"{params.function} raised {type(error).__name__}: {error}") from error
    if verdict is None or verdict is True:
        return PASSED
    if verdict is False:
        return failed(f"{params.function} says no")
    if isinstance(verdict, str):
        return failed(verdict) if verdict else PASSED
    raise CheckError(f"{params.function} returned {type(verdict).__name__}, not a truth value or a text")
