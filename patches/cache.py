"""What probes found, kept between processes, so that commands do not pay for them.

A result holds for one source of the defect's module (and of what it imports from qat), one set of library versions, one
build of torch and one machine; anything else asks again. The file lies in the user's cache folder; it is written
atomically and under a lock, and a damaged one counts as empty.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import qat
from qat.errors import UserError
from qat.patches.protocol import Defect, Place, ProbeResult, Status
from qat.receipt import environment, sha256_file
from qat.serve.engine import engine_folder
from qat.storage import write_json

Kind = Literal["probe", "repair"]
_FORMAT = 1
_MAX_RESULTS = 1000
_MAX_BYTES = 4 << 20
_PACKAGE = Path(qat.__file__).parent
_IMPORT = re.compile(r"^[ \t]*(?:from +(qat[\w.]*) +import +(\([^)]*\)|[^\n]*)|import +(qat[\w.]*))", re.MULTILINE)
# How a probe is called and remembered does not change what it finds.
_MACHINERY = {"qat.patches.registry", "qat.patches.cache", "qat.patches.check"}


class Remembered(NamedTuple):
    """A result and what it took.

    Attributes:
        result: Of a probe or a repair.
        seconds: Wall time.
    """

    result: ProbeResult
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        status, detail = self.result
        return {"status": status.value, "detail": detail, "seconds": round(self.seconds, 3)}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Remembered:
        """What `to_json` gave.

        Raises:
            KeyError: A field is missing.
            TypeError: It is no such object.
            ValueError: A field has another meaning.
        """
        return cls(ProbeResult(Status(entry["status"]), str(entry["detail"])), float(entry["seconds"]))


def timed(look: Callable[[], ProbeResult]) -> Remembered:
    """Look, and take the time."""
    start = time.monotonic()
    result = look()
    return Remembered(result, time.monotonic() - start)


def through(defect: Defect, kind: Kind, look: Callable[[], ProbeResult]) -> ProbeResult:
    """The remembered result, or what `look` finds, which is remembered then.

    A remembered `CANNOT_TELL` is looked at again: what was missing may have been loaded into this process since.

    Args:
        defect: Whose result it is.
        kind: Whether the defect was looked for, or the repair tried.
        look: Finds out.
    """
    known = recall(defect, kind)
    if known is None or known.result.status is Status.CANNOT_TELL:
        known = timed(look)
        remember(defect, kind, known)
    return known.result


def recall(defect: Defect, kind: Kind) -> Remembered | None:
    """What is known of a defect under exactly the present conditions; None where nothing is."""
    return _read(cache_file()).get(_key(defect, kind))


def remember(defect: Defect, kind: Kind, found: Remembered) -> None:
    """Keep a result; a cache folder that cannot be written is done without.

    `APPLIED` is not kept where a probe says it: it is a fact about one process.
    """
    if kind == "probe" and found.result.status is Status.APPLIED:
        return
    path = cache_file()
    with suppress(OSError, UserError), _locked(path):
        results = _read(path)
        key = _key(defect, kind)
        results.pop(key, None)
        results[key] = found
        newest = list(results.items())[-_MAX_RESULTS:]
        write_json(path, {"format": _FORMAT, "results": {key: entry.to_json() for key, entry in newest}})


def cache_file() -> Path:
    """`$XDG_CACHE_HOME/qat/probes.json`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qat" / "probes.json"


def versions(defect: Defect) -> dict[str, str]:
    """Installed versions of a defect's libraries (in vLLM's environment where the probe runs there), or `absent`."""
    paths = _engine_paths() if defect.place is Place.ENGINE else sys.path
    return {library: _version(library, tuple(paths)) for library in defect.libraries}


def _key(defect: Defect, kind: Kind) -> str:
    module = type(defect).__module__
    paths = tuple(_engine_paths()) if defect.place is Place.ENGINE else tuple(sys.path)
    facts = {
        "source": _source_digest(module, with_plugin=defect.place is Place.ENGINE),
        "versions": versions(defect),
        "python": platform.python_version(),
        "torch": _torch_build(paths),
        "machine": _machine(),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{defect.name} {kind} {digest}"


# What a result depends on ---------------------------------------------------------------------------------------------


@functools.cache
def _source_digest(module: str, with_plugin: bool) -> str:
    """Hash of a module's file and of everything in qat that it imports, directly or not."""
    files = set((_PACKAGE / "serve" / "vllm_plugin").rglob("*.py")) if with_plugin else set[Path]()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _module_file(name)
        if file is None or file in files or name in _MACHINERY:
            continue
        files.add(file)
        for package, members, plain in _IMPORT.findall(file.read_text(encoding="utf-8")):
            waiting += [package or plain, *(f"{package}.{member}" for member in re.findall(r"\w+", members))]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _module_file(name: str) -> Path | None:
    if name.partition(".")[0] != "qat":
        # A defect of a test, or of somebody's own module.
        origin = getattr(sys.modules.get(name), "__file__", None)
        return Path(origin) if origin else None
    place = _PACKAGE.joinpath(*name.split(".")[1:])
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


@functools.cache
def _version(library: str, paths: tuple[str, ...]) -> str:
    found = next(iter(metadata.distributions(name=library, path=list(paths))), None)
    return "absent" if found is None else found.version


@functools.cache
def _torch_build(paths: tuple[str, ...]) -> str:
    """What torch says of its build (version, CUDA, commit), read without importing it."""
    files = (Path(path) / "torch" / "version.py" for path in paths)
    return next((sha256_file(file) for file in files if file.is_file()), "absent")


@functools.cache
def _machine() -> dict[str, Any]:
    """Processor with its instruction sets, and the GPUs by name."""
    flags: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((sorted(line.split()) for line in lines if line.startswith(("flags", "Features"))), [])
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = [line for path in gpus for line in path.read_text().splitlines() if line.startswith("Model")]
    return {"cpu": environment()["cpu"], "flags": flags, "gpus": names}


def _engine_paths() -> list[str]:
    return [str(path) for path in sorted(engine_folder().glob("lib/python3*/site-packages"))]


# The file -------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Remembered]:
    """The results on disk, oldest first; none where the file is missing or damaged."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return {}
        return {key: Remembered.from_json(entry) for key, entry in content["results"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the cache's lock, waiting for it; the kernel frees it with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
