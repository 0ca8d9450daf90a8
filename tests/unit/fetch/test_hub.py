"""Downloads against a stub of the hub; the oracle is the content that the stub holds."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.fetch import hub as fetching
from qat.fetch.download import PART
from qat.fetch.hub import allowed, fetch_from_hub
from qat.recipe.schema import BaseBlock
from qat.train.base import resolve_base
from tests.unit.fetch.conftest import MODEL
from tests.unit.fetch.stub_hub import COMMIT, StubHub

SHARD = "model-00001-of-00002.safetensors"
ROOT = Path(__file__).resolve().parents[3]


def block() -> BaseBlock:
    return BaseBlock(model=MODEL, family="llama")


def parts(tmp_path: Path) -> list[Path]:
    return list(tmp_path.rglob(f"*{PART}"))


def test_takes_what_is_allowed_and_recipes_find_it(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = fetch_from_hub(MODEL, None)
    taken = {name: content for name, content in hub.files.items() if allowed(name)}
    assert set(fetched.files) == set(taken) and "pytorch_model.bin" not in taken and "modeling.py" not in taken
    assert {name: (fetched.folder / name).read_bytes() for name in taken} == taken
    assert fetched.revision == COMMIT and fetched.bytes == fetched.downloaded == sum(map(len, taken.values()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_base(block()) == fetched.folder


def test_a_second_call_downloads_nothing_and_a_pinned_commit_is_found(hub: StubHub) -> None:
    fetch_from_hub(MODEL, None)
    hub.ranges.clear()
    again = fetch_from_hub(MODEL, COMMIT)
    assert again.downloaded == 0 and hub.ranges == []


def test_config_only_brings_no_weights(hub: StubHub) -> None:
    fetched = fetch_from_hub(MODEL, None, weights=False)
    assert "config.json" in fetched.files and not any(name.endswith(".safetensors") for name in fetched.files)
    assert {name for name, _ in hub.ranges} == set(fetched.files)


def test_a_broken_connection_is_gone_on_with_where_it_was(hub: StubHub) -> None:
    hub.cut[SHARD] = 7000
    fetched = fetch_from_hub(MODEL, None)
    assert (fetched.folder / SHARD).read_bytes() == hub.files[SHARD]
    assert [asked for name, asked in hub.ranges if name == SHARD] == [None, "bytes=7000-"]


def test_a_server_without_ranges_begins_anew(hub: StubHub) -> None:
    hub.cut[SHARD], hub.ignore_ranges = 7000, True
    fetched = fetch_from_hub(MODEL, None)
    assert (fetched.folder / SHARD).read_bytes() == hub.files[SHARD]


def test_a_killed_call_is_resumed_by_the_next(hub: StubHub, tmp_path: Path) -> None:
    """SIGKILL in the middle of a shard; the next call asks only for what is missing of it."""
    big = bytes(range(256)) * 4096 * 40
    hub.files[SHARD] = big
    program = f"from qat.fetch.hub import fetch_from_hub\nfetch_from_hub({MODEL!r}, None)\n"
    environment = {
        "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    killed = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 1 << 18 for path in parts(tmp_path)):
        assert time.monotonic() < deadline and killed.poll() is None, "the download ended before it could be killed"
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    there = sum(path.stat().st_size for path in parts(tmp_path))
    assert 0 < there < len(big)
    hub.ranges.clear()
    fetched = fetch_from_hub(MODEL, None)
    assert (fetched.folder / SHARD).read_bytes() == big
    asked = dict(hub.ranges)[SHARD]
    assert asked is not None and int(asked.removeprefix("bytes=").removesuffix("-")) > 1 << 18


def test_wrong_bytes_are_refused_and_removed(hub: StubHub, tmp_path: Path) -> None:
    hub.shown[SHARD] = b"?" + hub.files[SHARD][1:]
    with pytest.raises(UserError, match="other bytes than the hub has"):
        fetch_from_hub(MODEL, None)
    assert not any(path.name.startswith(SHARD) for path in parts(tmp_path))
    hub.shown.clear()
    assert (fetch_from_hub(MODEL, None).folder / SHARD).read_bytes() == hub.files[SHARD]


def test_a_small_file_is_checked_by_gits_own_hash(hub: StubHub) -> None:
    hub.shown["config.json"] = b'{"model_type": "LLAMA"}'
    with pytest.raises(UserError, match="other bytes than the hub has"):
        fetch_from_hub(MODEL, None)


def test_a_file_damaged_in_the_cache_is_noticed_and_comes_anew(hub: StubHub) -> None:
    shard = (fetch_from_hub(MODEL, None).folder / SHARD).resolve()
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"?")
    with pytest.raises(UserError, match="in the cache has other bytes"):
        fetch_from_hub(MODEL, None)
    assert (fetch_from_hub(MODEL, None).folder / SHARD).read_bytes() == content


def test_too_small_a_disk_is_said_before_anything_comes(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**12, 10**12, 10**9)  # type: ignore[attr-defined]
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="too little space"):
        fetch_from_hub(MODEL, None)
    assert hub.ranges == []


def test_a_disk_that_fills_up_on_the_way(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qat.fetch.download.os.fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        fetch_from_hub(MODEL, None)


def test_the_token_comes_from_the_environment_alone(
    hub: StubHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("right")  # as `hf auth login` leaves it
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    hub.token = "right"
    with pytest.raises(UserError, match="consent") as refused:
        fetch_from_hub(MODEL, None)
    assert "no HF_TOKEN" in str(refused.value) and set(hub.tokens) == {None}
    monkeypatch.setenv("HF_TOKEN", "right")
    assert fetch_from_hub(MODEL, None).downloaded


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "", "no such model on the hub, or it is private"),
        (404, "RepoNotFound", "no such model on the hub"),
        (403, "GatedRepo", "consent"),
        (403, "", "The hub refuses"),
    ],
)
def test_each_refusal_has_its_message(hub: StubHub, status: int, code: str, words: str) -> None:
    hub.status = (status, code)
    with pytest.raises(UserError, match=words) as refused:
        fetch_from_hub(MODEL, None)
    assert "\n" not in refused.value.what and refused.value.remedy


def test_an_unknown_revision(hub: StubHub) -> None:
    with pytest.raises(UserError, match="no such revision"):
        fetch_from_hub(MODEL, "v9")


def test_nobody_there(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        fetch_from_hub(MODEL, None)


def test_a_repository_of_pickles_is_refused(hub: StubHub) -> None:
    hub.files = {name: content for name, content in hub.files.items() if not name.endswith(".safetensors")}
    with pytest.raises(UserError, match="no safetensors weights"):
        fetch_from_hub(MODEL, None)


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("model.safetensors", True),
        ("tokenizer.model", True),
        ("LICENSE", True),
        ("pytorch_model.bin", False),
        ("model.pt", False),
        ("training_args.bin", False),
        ("configuration_nemotron_h.py", False),
        ("model.gguf", False),
        ("sub/model.safetensors", False),
    ],
)
def test_what_is_allowed(name: str, taken: bool) -> None:
    assert allowed(name) is taken
