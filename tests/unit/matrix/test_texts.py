"""Real texts as token rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qat.errors import UserError
from qat.matrix import texts


def _files(folder: Path) -> list[str]:
    """Every source with a few records in its own form; returns what should be read."""
    read = []
    for number, name in enumerate(texts.SOURCES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        said = [f"Question {number} {row}? " + "word " * 30 for row in range(30)]
        records = [{"id": "x1", "question": text, "tags": ["a b", {"answer": "so it is"}]} for text in said]
        short = {"question": "too short"}
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in [*records, short]))
        elif number % 2:
            path.write_text(json.dumps({str(key): record for key, record in enumerate([*records, short])}))
        else:
            path.write_text(json.dumps([*records, short]))
        read += [f"{text.strip()}\na b\nso it is<|im_end|>\n" for text in said]
    return read


def test_rows_hold_every_document_on_one_side(tmp_path: Path) -> None:
    read = _files(tmp_path)
    texts.prepare(tmp_path, tmp_path / "out", length=64, generated=50, size=1024)
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out" / "tokenizer")
    sides = {name: np.load(tmp_path / "out" / f"{name}.npy") for name in ("train", "held_out")}
    assert all(rows.dtype == np.uint16 and rows.shape[1] == 64 for rows in sides.values())
    decoded = {name: "".join(tokenizer.decode([t for t in row if t]) for row in rows) for name, rows in sides.items()}
    for text in read:
        other = "train" if texts.held_out(text) else "held_out"
        assert text[:14] not in decoded[other]
    kept = [text for text in read if not texts.held_out(text)]
    assert sum(text[:14] in decoded["train"] for text in kept) >= len(kept) - 1  # the last row may be unfilled
    listed = json.loads((tmp_path / "out" / "texts.json").read_text())
    assert {name: entry["documents"] for name, entry in listed.items()} == dict.fromkeys(texts.SOURCES, 30)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        texts.prepare(tmp_path, tmp_path / "out")
