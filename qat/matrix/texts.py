"""Real texts for the second base: permissively licensed public files, cut into documents and packed as token rows.

Made once where the files are (`prepare`); what training reads afterwards is a folder with a tokenizer, `train.npy` and
`held_out.npy`, uint16 `(rows, length)`, and `texts.json`, which names files, licences and hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qat.data.generate.corpus import documents
from qat.data.generate.tokenizer import EOS, train_tokenizer
from qat.errors import UserError
from qat.storage import write_json
from qat.train.tiny_base import pack

SOURCES = {
    "gsm8k/train.jsonl": "MIT",
    "pubmedqa/ori_pqal.json": "MIT",
    "medmcqa/validation_opa_layout.jsonl": "MIT",
    "rasbt_instruction/instruction-data.json": "Apache-2.0",
    "self_instruct_seed/seed_tasks.jsonl": "Apache-2.0",
    "toolalpaca/eval_simulated.json": "Apache-2.0",
}
"""Files below the folder, with their licences."""
VOCABULARY = 8192
LEAST_CHARACTERS = 80
"""Shorter documents say little: labels, identifiers."""
HELD_OUT_ONE_IN = 20


def prepare(folder: Path, out: Path, *, length: int = 512, generated: int = 40_000, size: int = VOCABULARY) -> None:
    """Train a tokenizer on generated and real documents, and pack the real ones.

    Args:
        folder: Holds `SOURCES`.
        out: Where the result goes.
        length: Tokens of a row.
        generated: Documents of the small world that the tokenizer is trained on besides.
        size: Pieces of the tokenizer.

    Raises:
        UserError: A file is missing.
    """
    texts = {name: list(_documents(folder / name)) for name in SOURCES}
    real = [text for found in texts.values() for text in found]
    tokenizer = train_tokenizer([*documents(2, 0, generated), *real], size)
    tokenizer.save_pretrained(out / "tokenizer")
    kept = [text for text in real if not held_out(text)]
    for name, chosen in (("train", kept), ("held_out", [text for text in real if held_out(text)])):
        np.save(out / f"{name}.npy", rows_of(chosen, tokenizer, length))
    write_json(
        out / "texts.json",
        {
            name: {
                "licence": SOURCES[name],
                "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
                "documents": len(found),
                "characters": sum(map(len, found)),
            }
            for name, found in texts.items()
        },
    )


def held_out(text: str) -> bool:
    """Whether a document is kept for measuring: one in twenty, by its hash."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def rows_of(texts: list[str], tokenizer: Any, length: int) -> np.ndarray:
    """Documents as uint16 rows `(rows, length)`, packed as the generated corpus is; the last, unfilled row is lost."""
    ids: list[int] = []
    ends: list[int] = []
    for text in texts:
        found = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        for start in range(0, len(found), length):
            ids += found[start : start + length]
            ends.append(len(ids))
    return pack(np.asarray(ids, dtype=np.uint16), np.asarray(ends), length)


def _documents(path: Path) -> Iterator[str]:
    """One document for each record: its texts, line by line."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError("A file of real texts is missing.", where=str(path), value=str(error)) from error
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in content.split("\n") if line.strip()]
    else:
        loaded = json.loads(content)
        records = list(loaded.values()) if isinstance(loaded, dict) else loaded
    for record in records:
        text = "\n".join(_strings(record))
        if len(text) >= LEAST_CHARACTERS:
            yield f"{text}{EOS}\n"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if " " in value.strip():
            yield value.strip()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
