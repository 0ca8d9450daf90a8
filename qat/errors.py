"""The two kinds of failure and the exit codes of every command.

A `UserError` is a fault of the input: it is printed as one message, without a traceback, and the process exits with 2.
Every other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit status means; the same everywhere."""

    DONE = 0
    FAIL = 1
    USER_ERROR = 2
    INCONCLUSIVE = 3
    INTERRUPTED = 130


class UserError(Exception):
    """A fault that the user can mend.

    Args:
        what: One sentence: what is wrong.
        where: File, key path or stage.
        value: The offending value, shown with `repr` unless it is a string.
        remedy: What to do about it.
    """

    def __init__(self, what: str, *, where: str = "", value: object = None, remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.value = value
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where:  {self.where}")
        if self.value is not None:
            shown = self.value if isinstance(self.value, str) else repr(self.value)
            lines.append(f"  value:  {shown}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.what, self.where, self.value, self.remedy))


def _rebuild(what: str, where: str, value: object, remedy: str) -> UserError:
    return UserError(what, where=where, value=value, remedy=remedy)
