from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat.data import records
from qat.data.records import Source, without_nulls
from qat.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f'question {number} ಕನ್ನಡ, [1] "quoted" \\ '}], "id": f"r{number}"}
    for number in range(700)
]


def parsed(source: Source) -> list[Any]:
    return [json.loads(entry.raw) if isinstance(entry.raw, bytes) else entry.raw for entry in source]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("read", [7, 100, 1 << 20])
def test_an_array_comes_element_by_element_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, read: int
) -> None:
    monkeypatch.setattr(records, "_READ", read)
    path = tmp_path / "a.json"
    text = json.dumps(ROWS[:40], indent=indent, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = list(Source(path))
    assert [json.loads(entry.raw) for entry in found if isinstance(entry.raw, bytes)] == ROWS[:40]
    # Oracle: an element's line is where its text begins.
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines, start=1) if line == "  {"] if indent else [1] * 40
    assert [entry.number for entry in found] == starts


def test_numbers_and_texts_that_end_where_the_buffer_ends_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text("[12345, 678, true, []]")
    for read in range(1, 24):
        monkeypatch.setattr(records, "_READ", read)
        assert [entry.raw for entry in Source(path)] == [b"12345", b"678", b"true", b"[]"]


@pytest.mark.parametrize("broken", ['[{"a": 1}, {"a": ], {"a": 2}]', '[{"a": 1}, {"a": 2', '[{"a": 1},'])
def test_what_is_broken_in_an_array_is_handed_over(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(broken)
    first, *rest = [entry.raw for entry in Source(path)]
    assert first == b'{"a": 1}' and len(rest) == 1
    with pytest.raises(ValueError):
        json.loads(rest[0])


def test_lines_of_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}\r\n{"a": 3}')
    source = Source(path)
    assert [(entry.number, json.loads(entry.raw)) for entry in source if isinstance(entry.raw, bytes)] == [
        (1, {"a": 1}),
        (4, {"a": 2}),
        (5, {"a": 3}),
    ]
    assert source.place(0, 4) == "line 4"


def table(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("pyarrow").Table.from_pylist(rows)


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(table(ROWS[:300]), tmp_path / "train-00000-of-00002.parquet", row_group_size=77)
    parquet.write_table(table(ROWS[300:]), tmp_path / "train-00001-of-00002.parquet")
    parquet.write_table(table(ROWS[:3]), tmp_path / "test-00000-of-00001.parquet")
    source = Source(tmp_path)
    assert parsed(source) == ROWS  # only the training split
    assert [(entry.file, entry.number) for entry in source][298:302] == [(0, 298), (0, 299), (1, 0), (1, 1)]
    assert source.place(1, 5) == "train-00001-of-00002.parquet row 5"


def saved(folder: Path, shards: list[list[dict[str, Any]]]) -> None:
    """A folder as `Dataset.save_to_disk` writes it: Arrow streams, named in state.json in their order."""
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        content = table(rows)
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, content.schema) as writer:
            writer.write_table(content)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    saved(tmp_path / "one", [ROWS[:500], ROWS[500:]])
    assert parsed(Source(tmp_path / "one")) == ROWS
    saved(tmp_path / "dict" / "train", [ROWS[:5]])
    saved(tmp_path / "dict" / "test", [ROWS[5:9]])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert parsed(Source(tmp_path / "dict")) == ROWS[:5]


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        list(Source(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match="holds no data set"):
        Source(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match="table cannot be read"):
        list(Source(tmp_path / "a.parquet"))
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(UserError, match="several kinds"):
        Source(tmp_path)


def test_keys_that_hold_nothing_are_left_out() -> None:
    row = {"a": None, "b": [{"c": None, "d": 1}, None], "e": {"f": None}}
    assert without_nulls(row) == {"b": [{"d": 1}, None], "e": {}}
