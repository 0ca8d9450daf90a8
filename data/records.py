"""The records of a data set, one after the other, whatever they lie in: JSONL, a JSON array, Parquet, Arrow.

Nothing is held but the piece that is being read. A record keeps its place (the line where it begins, or the row of its
file), so that whoever finds a fault in it can say where.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qat.errors import UserError
from qat.receipt import sha256_file

_READ = 1 << 20
_ROWS = 256
_BETWEEN = re.compile(r"[\s,]*")
_TABLES = (".parquet", ".arrow")
_TEXTS = (".jsonl", ".json", ".ndjson")
_BOM = b"\xef\xbb\xbf"


class Entry(NamedTuple):
    """One record before it is looked at.

    Attributes:
        file: Which file of the source, from 0.
        number: Line where it begins (from 1) in a JSON file, row (from 0) in a table.
        raw: Its JSON text, or the row of a table.
    """

    file: int
    number: int
    raw: bytes | dict[str, Any]


class Source:
    """A file or folder of records.

    Attributes:
        path: As given.
        files: What is read, in order.
        names: Their names, below the folder where it is one.
        table: Whether the records are rows of tables.

    Raises:
        UserError: There is nothing to read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = _files_of(self.path)
        inside = self.files != [self.path]
        self.names = [Path(os.path.relpath(file, self.path)).as_posix() if inside else file.name for file in self.files]
        self.table = self.files[0].suffix in _TABLES

    def __iter__(self) -> Iterator[Entry]:
        """The records in the order of the files; a table is read a few hundred rows at a time."""
        for index, file in enumerate(self.files):
            try:
                yield from _entries(index, file)
            except OSError as error:
                raise UserError("The conversations cannot be read.", where=str(file), value=str(error)) from error

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def stems(self) -> tuple[str, ...]:
        """For each file what ids of its records begin with; with its folder where two files have one name."""
        short = [file.stem for file in self.files]
        return tuple(short if len(set(short)) == len(short) else (name.rpartition(".")[0] for name in self.names))

    def sha256(self) -> str:
        """SHA-256 of what is read, in hexadecimal.

        Of a file its bytes; of a folder the lines `<name>NUL<SHA-256 of the file>` of all files that are read, in the
        order of their names below the folder, each with a line break.
        """
        if self.files == [self.path]:
            return sha256_file(self.path)
        digest = hashlib.sha256()
        for name, file in sorted(zip(self.names, self.files, strict=True)):
            digest.update(f"{name}\0{sha256_file(file)}\n".encode())
        return digest.hexdigest()

    def place(self, file: int, number: int) -> str:
        """A place in words: `line 7`, or `data/train.parquet row 7` where there are several files or rows."""
        name = f"{self.names[file]} " if len(self.files) > 1 or self.table else ""
        return f"{name}{'row' if self.table else 'line'} {number}"


def _files_of(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError("The conversations cannot be read.", where=str(path), value="there is no such file or folder")
    if not path.is_dir():
        return [path]
    saved = _saved_dataset(path)
    files = saved or sorted(file for file in path.rglob("*") if file.suffix in (*_TABLES[:1], *_TEXTS[:1]))
    training = [file for file in files if file.stem.startswith("train")]
    files = training or files
    if not files:
        raise UserError(
            "The folder holds no data set.",
            where=str(path),
            remedy="give a folder with .parquet or .jsonl files, or one that `Dataset.save_to_disk` wrote",
        )
    kinds = sorted({file.suffix for file in files})
    if len(kinds) > 1:
        raise UserError("The folder holds files of several kinds.", where=str(path), value=", ".join(kinds))
    return files


def _saved_dataset(path: Path) -> list[Path]:
    """The Arrow files of what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote; of a dict its train split."""
    splits = path / "dataset_dict.json"
    if splits.is_file():
        names = _json_file(splits).get("splits") or []
        chosen = ["train"] if "train" in names else names
        return [file for name in chosen for file in _saved_dataset(path / name)]
    state = path / "state.json"
    if not state.is_file():
        return []
    return [path / str(part["filename"]) for part in _json_file(state).get("_data_files") or []]


def _json_file(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("The data set's description cannot be read.", where=str(path), value=str(error)) from error
    return value if isinstance(value, dict) else {}


def _entries(index: int, path: Path) -> Iterator[Entry]:
    if path.suffix in _TABLES:
        yield from (Entry(index, number, row) for number, row in enumerate(_rows(path)))
    elif _is_array(path):
        yield from (Entry(index, line, text) for line, text in _elements(path))
    else:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.strip():
                    yield Entry(index, number, line.rstrip(b"\n"))


def _is_array(path: Path) -> bool:
    with path.open("rb") as stream:
        start = stream.read(1024).removeprefix(_BOM).lstrip()
    return start.startswith(b"[")


def _elements(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line and text of every element of a JSON array; where one is broken, the rest of the file comes as one."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        text = stream.read(_READ)
        position = text.index("[") + 1
        line = 1 + text.count("\n", 0, position)
        while True:
            start = _BETWEEN.match(text, position).end()  # type: ignore[union-attr]
            line += text.count("\n", position, start)
            if start < len(text) and text[start] == "]":
                return
            try:
                end = decoder.raw_decode(text, start)[1] if start < len(text) else None
            except (ValueError, RecursionError):
                end = None
            # An element that reaches the end of what was read may go on behind it.
            if end is None or end == len(text):
                more = stream.read(max(_READ, len(text)))
                if not more:
                    yield line, text[start:].encode(errors="surrogateescape")
                    return
                text, position = text[start:] + more, 0
                continue
            yield line, text[start:end].encode(errors="surrogateescape")
            line += text.count("\n", start, end)
            position = end


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            "Reading tables needs pyarrow.", where=str(path), remedy="install qat with its `train` extra"
        ) from error
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as table:
                for batch in table.iter_batches(batch_size=_ROWS):
                    yield from (without_nulls(row) for row in batch.to_pylist())
        else:
            with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
                for batch in stream:
                    for start in range(0, batch.num_rows, _ROWS):
                        yield from (without_nulls(row) for row in batch.slice(start, _ROWS).to_pylist())
    except pa.ArrowException as error:
        raise UserError("The table cannot be read.", where=str(path), value=str(error)) from error


def without_nulls(value: Any) -> Any:
    """A value of a table without the keys that hold nothing: a column of records has every key in each of them."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def sample(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Those of the entries that are JSON objects, parsed, to see of what form they are."""
    found = []
    for entry in entries:
        try:
            value = json.loads(entry.raw) if isinstance(entry.raw, bytes) else entry.raw
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
