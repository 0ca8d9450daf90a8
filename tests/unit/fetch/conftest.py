from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fetch.stub_hub import StubHub

MODEL = "someone/small"


def safetensors(names: list[str], floats: int = 500) -> bytes:
    """A safetensors file by the format's own description: length, header, data."""
    header: dict[str, Any] = {}
    for index, name in enumerate(names):
        offsets = [4 * floats * index, 4 * floats * (index + 1)]
        header[name] = {"dtype": "F32", "shape": [floats], "data_offsets": offsets}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(256)) * (4 * floats * len(names) // 256 + 1)


def checkpoint() -> dict[str, bytes]:
    """Two shards with an index, a tokenizer, and what must never be taken."""
    shards = {
        f"model-0000{number}-of-00002.safetensors": safetensors([f"w{number}"], floats=64 * 100) for number in (1, 2)
    }
    shards = {name: content[: 8 + int.from_bytes(content[:8], "little") + 4 * 6400] for name, content in shards.items()}
    index = {"weight_map": {f"w{number}": name for number, name in enumerate(shards, 1)}}
    return {
        **shards,
        "model.safetensors.index.json": json.dumps(index).encode(),
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"x",
        "pytorch_model.bin": b"pickle" * 1000,
        "modeling.py": b"import os",
        "onnx/model.onnx": b"x" * 2000,
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubHub]:
    """The stub in the real one's place, with an empty cache and no token."""
    from huggingface_hub import constants

    server = StubHub(MODEL, checkpoint())
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qat.fetch.download._WAIT_SECONDS", 0.0)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()
