"""Progress of long steps: one bar with time left, the same everywhere; silent where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What a long step reports to."""

    def update(self, completed: int, note: str = "") -> None:
        """Say how many of the announced steps are done; `note` is shown behind the bar."""


class _Silent:
    def update(self, completed: int, note: str = "") -> None:
        del completed, note


@contextmanager
def progress_bar(label: str, total: int, *, enabled: bool | None = None) -> Iterator[Progress]:
    """Show a bar with percentage, elapsed time and time left on standard error.

    Args:
        label: What is being done.
        total: Number of steps.
        enabled: Force the bar on or off; by default it is shown. Where standard error is no terminal, one line is
            printed at every tenth of the way instead of a moving bar.
    """
    if enabled is False:
        yield _Silent()
        return
    if not sys.stderr.isatty():
        yield _Lines(label, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(label, total=total, note="")

        class _Rich:
            def update(self, completed: int, note: str = "") -> None:
                bar.update(task, completed=completed, note=note)

        yield _Rich()


class _Lines:
    """Ten lines in all, for logs and CI."""

    def __init__(self, label: str, total: int) -> None:
        import time

        self._label, self._total = label, max(total, 1)
        self._clock = time.monotonic
        self._start = time.monotonic()
        self._tenth = -1

    def update(self, completed: int, note: str = "") -> None:
        tenth = completed * 10 // self._total
        if tenth == self._tenth:
            return
        self._tenth = tenth
        spent = self._clock() - self._start
        left = spent / completed * (self._total - completed) if completed else float("nan")
        shown = "--" if completed == 0 else f"{left:.0f}"
        print(
            f"{self._label}: {completed}/{self._total}, {spent:.0f} s, {shown} s left {note}".rstrip(),
            file=sys.stderr,
            flush=True,
        )
