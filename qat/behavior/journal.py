"""An append-only file of JSON lines that survives a kill: every line is written once and synced to disk.

Syncing each of hundreds of lines a second alone would stop the runner for most of the time, so a thread takes what has
gathered, writes it in one go and syncs. A line is on disk a few milliseconds after `append`; leaving the context waits
for the last.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel

from qat.runs import storage_fault


class Journal:
    """Appends records to a file.

    Args:
        path: The file; made with its folder where missing.

    Attributes:
        on_disk: Records written and synced so far: what may be reported as kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on_disk = 0
        self._lines: list[bytes] = []
        self._ready = threading.Condition()
        self._closing = False
        self._fault: OSError | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise storage_fault(error, self.path) from error
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._ready:
            self._closing = True
            self._ready.notify()
        self._thread.join()
        os.close(self._file)
        if kind is None:
            self._raise_fault()

    def append(self, record: BaseModel) -> None:
        """Hand over one record.

        Raises:
            UserError: An earlier line could not be written.
        """
        self._raise_fault()
        line = record.model_dump_json().encode() + b"\n"
        with self._ready:
            self._lines.append(line)
            self._ready.notify()

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise storage_fault(self._fault, self.path) from self._fault

    def _write(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._lines or self._closing)
                lines, self._lines = self._lines, []
            if not lines:
                return
            try:
                content = memoryview(b"".join(lines))
                while content:
                    content = content[os.write(self._file, content) :]
                os.fsync(self._file)
                self.on_disk += len(lines)
            except OSError as error:
                self._fault = error
                return
