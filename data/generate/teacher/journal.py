"""The two files of a generation: the accepted conversations, and a log with one line for every attempt.

Each line is written once and synced. A conversation comes before its line in the log, so that a kill between the two
loses a count and never a conversation; a torn last line is cut off by the next call. What was asked for stands in the
log's first line, and a file is only continued for the same.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from qat.data.generate.teacher.client import Spent
from qat.data.load import normalise, to_line
from qat.data.schema import Conversation
from qat.errors import UserError
from qat.storage import storage_fault


@dataclass
class Attempt:
    """One line of the log.

    Attributes:
        brief: What was asked for: a category, or a case that is taught again.
        number: Of the attempt at this brief, from 0.
        outcome: `accepted`, or the reason of the rejection.
        detail: For people.
        spent: What it took.
    """

    brief: str
    number: int
    outcome: str
    detail: str = ""
    spent: Spent = field(default_factory=Spent)


class Journal:
    """Both files, open for appending; `with` holds them against a second process.

    Args:
        out: The JSONL file of accepted conversations; the log stands beside it as `<stem>.log.jsonl`.
        asked: What makes the conversations; a file that was made with something else is refused.

    Attributes:
        accepted: Brief to the ids on disk.
        conversations: All of them, in file order.
        attempts: Brief to the number of attempts so far.
        outcomes: Rejection reasons and how often, over all calls.
        spent: Over all calls.
    """

    def __init__(self, out: Path, asked: Mapping[str, Any]) -> None:
        self.out = out
        self.log = log_of(out)
        self.accepted: dict[str, list[str]] = defaultdict(list)
        self.conversations: list[Conversation] = []
        self.attempts: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.spent = Spent()
        self._asked = json.loads(json.dumps(asked, sort_keys=True))

    def __enter__(self) -> Self:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._log = os.open(self.log, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            self._out = os.open(self.out, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise storage_fault(error, self.out) from error
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise UserError("Another process is writing this file.", where=str(self.out)) from None
        try:
            self._read()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        os.close(self._log)
        os.close(self._out)

    def accept(self, attempt: Attempt, conversation: Conversation) -> None:
        """Keep a conversation and log its attempt."""
        self._append(self._out, to_line(conversation))
        self.conversations.append(conversation)
        self.accepted[attempt.brief].append(conversation["id"])
        self.reject(attempt)

    def reject(self, attempt: Attempt) -> None:
        """Log an attempt."""
        self._append(self._log, json.dumps(asdict(attempt), ensure_ascii=False))
        self._count(attempt)

    def _count(self, attempt: Attempt) -> None:
        self.attempts[attempt.brief] = max(self.attempts[attempt.brief], attempt.number + 1)
        self.spent.add(attempt.spent)
        if attempt.outcome != "accepted":
            self.outcomes[attempt.outcome] += 1

    def _append(self, file: int, line: str) -> None:
        content = memoryview(line.encode() + b"\n")
        try:
            while content:
                content = content[os.write(file, content) :]
            os.fsync(file)
        except OSError as error:
            raise storage_fault(error, self.out) from error

    def _read(self) -> None:
        lines = _whole_lines(self._log, self.log)
        if not lines:
            if os.fstat(self._out).st_size:
                raise UserError(
                    "The file exists and was not made by a teacher.",
                    where=str(self.out),
                    remedy="choose another name: a teacher's file is continued, never overwritten",
                )
            self._append(self._log, json.dumps({"asked": self._asked}, ensure_ascii=False))
        elif lines[0].get("asked") != self._asked:
            before = lines[0].get("asked") or {}
            changed = sorted(
                key for key in self._asked.keys() | before.keys() if self._asked.get(key) != before.get(key)
            )
            raise UserError(
                "The file was begun with something else.",
                where=str(self.out),
                value=f"changed: {', '.join(changed)}",
                remedy="choose another name for what the new settings give",
            )
        for line in lines[1:]:
            self._count(Attempt(**{**line, "spent": Spent(**line["spent"])}))
        for number, made in enumerate(_whole_lines(self._out, self.out), start=1):
            if faults := normalise(made, default_id=f"line {number}"):
                raise UserError(
                    "A line of the file is no conversation.", where=f"{self.out}, line {number}", value=faults[0]
                )
            brief, attempt = brief_of(made["id"])
            self.conversations.append(cast("Conversation", made))
            self.accepted[brief].append(made["id"])
            self.attempts[brief] = max(self.attempts[brief], attempt + 1)


def log_of(out: Path) -> Path:
    """Where the log of a file lies."""
    return out.with_name(f"{out.stem}.log.jsonl")


def identity(brief: str, attempt: int) -> str:
    """The id of a conversation."""
    return f"teacher-{brief}-{attempt:05d}"


def brief_of(conversation: str) -> tuple[str, int]:
    """Brief and attempt of an id.

    Raises:
        UserError: It is none of a teacher's.
    """
    brief, _, attempt = conversation.removeprefix("teacher-").rpartition("-")
    if not conversation.startswith("teacher-") or not brief or not attempt.isdigit():
        raise UserError("The file holds a conversation that no teacher made.", value=conversation)
    return brief, int(attempt)


def _whole_lines(file: int, path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, a torn last line cut off the file."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.ftruncate(file, whole)
    rows = []
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError("A line of the file is no JSON object.", where=f"{path}, line {number}")
        rows.append(row)
    return rows
