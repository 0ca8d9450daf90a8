"""A source streamed through the examination: here where it is small, in two processes where it is not."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

from qat.data.audit.examine import Examiner, Settings
from qat.data.audit.tally import Tally
from qat.data.forms import Form
from qat.data.records import Entry, Source

WORKERS = 2
_ALONE_BELOW = 8 << 20
"""Bytes of a source that is not worth the seconds which two processes take to start."""
_PIECE = 128
_AHEAD = 3
"""Pieces a process may have waiting: enough to keep it busy, too few to fill the memory."""

_examiner: Examiner | None = None


def tallies(source: Source, form: Form, settings: Settings, workers: int | None = None) -> Iterator[Tally]:
    """Examine a source piece by piece.

    Args:
        source: The records.
        form: Their form.
        settings: What is looked at.
        workers: Processes; 0 examines in this one; None: two where the source is large.

    Yields:
        One tally a piece, in the source's order, whatever finished first.
    """
    if workers is None:
        workers = WORKERS if source.bytes >= _ALONE_BELOW else 0
    stems = source.stems
    if workers == 0:
        examiner = Examiner(settings, form, stems)
        yield from (examiner.read(piece) for piece in _pieces(source))
        return
    # A fresh process inherits no threads, locks or device of this one.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(settings, form, stems)
    )
    waiting: deque[Future[Tally]] = deque()
    try:
        for piece in _pieces(source):
            waiting.append(pool.submit(_examine, piece))
            if len(waiting) > workers * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pieces(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    piece: list[Entry] = []
    for entry in entries:
        piece.append(entry)
        if len(piece) == _PIECE:
            yield piece
            piece = []
    if piece:
        yield piece


def _start(settings: Settings, form: Form, stems: tuple[str, ...]) -> None:
    global _examiner
    _examiner = Examiner(settings, form, stems)


def _examine(piece: list[Entry]) -> Tally:
    if _examiner is None:
        raise RuntimeError("a process of the audit was not started by _start")
    return _examiner.read(piece)
