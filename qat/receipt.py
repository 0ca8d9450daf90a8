"""What a run writes down about itself: hashes, versions of what it stands on, memory at its peak."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import sys
import threading
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

# Packages whose version can change a result.
_PACKAGES = (
    "torch",
    "transformers",
    "nvidia-modelopt",
    "peft",
    "accelerate",
    "trl",
    "safetensors",
    "tokenizers",
    "numpy",
    "scipy",
    "pydantic",
)
_CHUNK = 1 << 20


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_path(path: Path) -> str:
    """SHA-256 of a file, or of a folder: over name, NUL, hash and newline of every file below it, sorted by name."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file()):
        digest.update(f"{name}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def environment() -> dict[str, Any]:
    """Python, package versions, processor and threads; jsonable."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "cpu": _cpu_name(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class MemoryWatch:
    """Peak resident memory of this process and everything that it started, summed at the same moment.

    `getrusage` knows the peak of this process and of its largest finished child, but not what they held together, and
    its peaks never fall from one stage to the next. So a thread adds up the process tree every second (Linux: `/proc`),
    each process by its proportional share of pages (PSS), so that pages which processes share count once. Where `/proc`
    cannot be read, the larger of the two `getrusage` peaks remains.
    """

    def __init__(self, interval_s: float = 1.0) -> None:
        self._interval_s = interval_s
        self._peak_bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> MemoryWatch:
        self._stop.clear()
        self._sample()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._sample()

    @property
    def peak_mb(self) -> float:
        """Peak so far in MB (10^6 bytes)."""
        if self._peak_bytes:
            return round(self._peak_bytes / 1e6, 1)
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return round(max(peaks) * unit / 1e6, 1)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        self._peak_bytes = max(self._peak_bytes, sum(_resident_bytes(pid) for pid in process_tree(os.getpid())))


def process_tree(root: int) -> list[int]:
    """The process and all its descendants, as far as `/proc` shows them."""
    children: dict[int, list[int]] = {}
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return [root]
    for pid in pids:
        parent = _parent(pid)
        if parent is not None:
            children.setdefault(parent, []).append(pid)
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return found


def _parent(pid: int) -> int | None:
    try:
        # The second field is the program's name in brackets and may hold anything, brackets and blanks included.
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2]
        return int(after_name.split()[1])
    except (OSError, IndexError, ValueError):
        return None


def _resident_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_bytes().splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
    except (OSError, IndexError, ValueError):
        pass  # it has just ended, or is another user's
    return 0


def files_digest(paths: Iterable[Path], whole_below: int = 64 << 20) -> str:
    """A quick identity of a large folder's files: name and size of all, contents of those below `whole_below` bytes.

    Hashing 60 GB of shards at every call would take minutes; a shard that changes in place without changing its size
    is caught by the exporter, which compares the hash that training recorded.
    """
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        size = path.stat().st_size
        content = sha256_file(path) if size < whole_below else "-"
        digest.update(f"{path.name}\0{size}\0{content}\n".encode())
    return digest.hexdigest()
