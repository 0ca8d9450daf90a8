"""A run's conversations from a folder: read, hashed into the receipt, and read again when any file changes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from qat.chain import TRAIN_FILE, VALIDATION_FILE, data
from qat.data.generate import conversations
from qat.data.load import load_conversations, to_line
from qat.data.records import Source
from qat.data.schema import load_persona
from qat.recipe.load import load_recipe
from qat.runs import Run


def _made(count: int) -> list[Any]:
    return list(conversations(load_persona("annie_tiny"), count, seed=3))


def _jsonl(folder: Path, rows: list[Any]) -> list[Path]:
    half = len(rows) // 2
    files = [folder / "a" / "part.jsonl", folder / "b" / "part.jsonl"]  # one name twice, as shards by day have
    for file, part in zip(files, (rows[:half], rows[half:]), strict=True):
        file.parent.mkdir(parents=True)
        # Without ids, so that those which the reader gives must differ between the files.
        file.write_text("".join(to_line({**row, "id": None}) + "\n" for row in part), encoding="utf-8")
    return files


def _parquet(folder: Path, rows: list[Any]) -> list[Path]:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    half = len(rows) // 2
    files = [folder / f"train-{number:05d}-of-00002.parquet" for number in range(2)]
    for file, part in zip(files, (rows[:half], rows[half:]), strict=True):
        lines = [json.loads(to_line(row)) for row in part]
        table = pyarrow.Table.from_pylist([{**row, "tools": json.dumps(row["tools"])} for row in lines])
        parquet.write_table(table, file)
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": []}]), folder / "test-00000-of-00001.parquet")
    return files


def _saved(folder: Path, rows: list[Any]) -> list[Path]:
    datasets = pytest.importorskip("datasets")
    lines = [json.loads(to_line(row)) for row in rows]
    datasets.Dataset.from_list([{**row, "tools": json.dumps(row["tools"])} for row in lines]).save_to_disk(str(folder))
    return sorted(folder.glob("*.arrow"))


def _rewrite(file: Path) -> None:
    """Other bytes, the same conversations."""
    if file.suffix == ".jsonl":
        file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    elif file.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(parquet.read_table(file), file, compression="gzip")


def _by_hand(folder: Path, files: list[Path]) -> str:
    lines = [(str(file.relative_to(folder)), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return hashlib.sha256("".join(f"{name}\0{digest}\n" for name, digest in sorted(lines)).encode()).hexdigest()


@pytest.mark.parametrize("write", [_jsonl, _parquet, _saved])
def test_a_folder_through_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], write: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, rows = tmp_path / "set", _made(40)
    files = write(folder, rows)
    recipe = load_recipe("annie_tiny", [f"data.source={folder}", "data.count=null", "train.distill.prompts=null"])

    def stage() -> dict[str, Any]:
        with Run.open(recipe, root=tmp_path / "runs") as run:
            data(run)
            record: dict[str, Any] = json.loads((run.folder / "receipt.json").read_text())["stages"]["data"]
        return record

    first = stage()
    assert first["inputs"]["source_sha256"] == _by_hand(folder, files) == Source(folder).sha256()
    assert sorted(first["notes"]["source_files"]) == sorted(str(file.relative_to(folder)) for file in files)
    split = [*load_conversations(tmp_path / "runs" / "annie_tiny" / TRAIN_FILE)]
    split += load_conversations(tmp_path / "runs" / "annie_tiny" / VALIDATION_FILE)
    assert sorted(json.dumps(each["messages"], sort_keys=True) for each in split) == sorted(
        json.dumps(each["messages"], sort_keys=True) for each in rows
    )
    (folder / "README.md").write_text("no conversations")
    assert stage() == first  # done: nothing that is read has changed
    if write is not _saved:  # its files are not rewritten by hand
        for file in files:
            before = stage()
            capsys.readouterr()
            _rewrite(file)
            after = stage()
            assert "[data] runs again: source_sha256 changed" in capsys.readouterr().err
            assert after["inputs"]["source_sha256"] == _by_hand(folder, files) != before["inputs"]["source_sha256"]


def test_one_file_is_hashed_as_itself(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"messages": []}\n')
    assert Source(file).sha256() == hashlib.sha256(file.read_bytes()).hexdigest()
    assert Source(file).names == ["a.jsonl"] and Source(file).stems == ("a",)
    # A folder of one file says its name too: renaming it is a change.
    assert Source(tmp_path).sha256() == _by_hand(tmp_path, [file])
