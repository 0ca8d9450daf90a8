"""The run folder: one lock, resumable stages, a receipt, and nothing half-written.

A stage is done when its record in the receipt says so, the fingerprint of its inputs is the same as then and all its
outputs are there. The record is written before the stage starts (status `running`), so that a killed process leaves
behind for which inputs its partial files were made: the same inputs go on from them, other inputs start afresh.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import qat
from qat.errors import UserError
from qat.receipt import MemoryWatch, environment, sha256_path, size_of
from qat.recipe.load import load_recipe
from qat.recipe.schema import Recipe
from qat.storage import LOCK, release_lock, storage_fault, take_lock, write_atomic, write_json

__all__ = ["Run", "Stage", "read_receipt", "run_folder", "storage_fault", "write_atomic", "write_json"]

RECEIPT = "receipt.json"
RECIPE = "recipe.yaml"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
Say = Callable[[str], None]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Stage:
    """One stage of a run; made by `Run.stage`, used as a context manager.

    Attributes:
        done: Nothing to do: same fingerprint and all outputs present.
        resuming: Partial files of a broken-off attempt with the same fingerprint are there.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        needs: Sequence[str],
        work: Sequence[str],
    ) -> None:
        self._run, self.name = run, name
        self._inputs, self._outputs, self._work = dict(inputs), list(outputs), list(work)
        self._notes: dict[str, Any] = {}
        self.fingerprint = run.fingerprint(name, inputs, needs)
        record = run.record(name)
        self._record = record
        same = record.get("fingerprint") == self.fingerprint
        self.done = same and record.get("status") == "done" and run.has_outputs(record, outputs)
        self.resuming = same and not self.done and bool(record)
        self._watch = MemoryWatch()

    def note(self, **facts: Any) -> None:
        """Put facts into the receipt; jsonable."""
        self._notes.update(facts)

    def __enter__(self) -> Stage:
        run = self._run
        if self.done:
            run.say(f"[{self.name}] done before ({self._record.get('seconds', 0.0):.0f} s)")
            return self
        if self._record and not self.resuming:
            changed = _differences(self._record.get("inputs", {}), self._inputs)
            run.say(f"[{self.name}] runs again: {', '.join(changed) or 'an earlier stage'} changed")
            # Broken off while removing, the leftovers must fit no recipe at all.
            run.write_record(self.name, {**self._record, "status": "interrupted", "fingerprint": ""})
            for path in {*self._work, *self._outputs}:
                _remove(run.path(path))
        elif self.resuming and self._record.get("status") == "done":
            run.say(f"[{self.name}] runs again: its outputs are missing or changed")
        else:
            run.say(f"[{self.name}] {'resumes' if self.resuming else 'starts'}")
        self._started, self._clock = _now(), time.monotonic()
        run.write_record(self.name, self._as_record("running"))
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.done:
            return
        self._watch.__exit__(None, None, None)
        if error is None:
            self._finish()
            return
        status = "failed" if isinstance(error, Exception) else "interrupted"
        self.note(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": "))
        try:
            self._run.write_record(self.name, self._as_record(status))
        except UserError as second:  # a full disk must not hide why the stage failed
            error.add_note(f"and the receipt could not be written: {second}")

    def _finish(self) -> None:
        missing = [path for path in self._outputs if not self._run.path(path).exists()]
        if missing:
            raise RuntimeError(f"stage {self.name} ended without its outputs {missing}")
        record = self._as_record("done")
        record["outputs"] = {path: sha256_path(self._run.path(path)) for path in self._outputs}
        record["bytes"] = {path: size_of(self._run.path(path)) for path in self._outputs}
        self._run.write_record(self.name, record)
        self._run.say(f"[{self.name}] {record['seconds']:.0f} s, at most {record['peak_rss_mb']:,.0f} MB")

    def _as_record(self, status: str) -> dict[str, Any]:
        return {
            "status": status,
            "fingerprint": self.fingerprint,
            "inputs": self._inputs,
            "outputs": {},
            "bytes": {},
            "notes": self._notes,
            "seconds": round(time.monotonic() - self._clock, 2),
            "peak_rss_mb": self._watch.peak_mb if status != "running" else None,
            "started": self._started,
            "finished": None if status == "running" else _now(),
        }


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, with both values where these are short."""
    found: list[str] = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            shown = f"{old!r} -> {new!r}"
            found.append(f"{prefix}{key}" + (f" ({shown})" if len(shown) <= 60 else ""))
    return found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Run:
    """An open run folder; holds its lock until `close` (or the end of the `with` block, or of the process)."""

    def __init__(self, folder: Path, recipe: Recipe, lock: int, say: Say = _say) -> None:
        self.folder, self.recipe, self.say = folder, recipe, say
        self.name = folder.name
        self._lock: int | None = lock
        self._receipt = self._load_receipt()

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        root: str | Path = "runs",
        name: str | None = None,
        fresh: bool = False,
        say: Say = _say,
    ) -> Run:
        """Open or make `<root>/<name>`; an existing run goes on, with the recipe as it is now.

        Args:
            recipe: What to run.
            root: Folder of all runs.
            name: Name of the run; by default the recipe's.
            fresh: Throw away what an earlier call left.
            say: Where notices go; by default standard error.

        Raises:
            UserError: A bad name, a folder that is no run, another process in it, a full disk, a damaged receipt.
        """
        folder = run_folder(root, recipe.name if name is None else name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            contents = {path.name for path in folder.iterdir()}
        except OSError as error:
            raise storage_fault(error, folder) from error
        if contents and not contents & {LOCK, RECIPE, RECEIPT}:
            raise UserError(
                "this folder is not empty and is no run", where=str(folder), remedy="choose another --run or --runs-dir"
            )
        lock = take_lock(folder)
        try:
            if fresh:
                for path in folder.iterdir():
                    if path.name != LOCK:
                        _remove(path)
            run = cls(folder, recipe, lock, say)
            run._announce_changes()
            write_atomic(folder / RECIPE, recipe.to_yaml())
            run._write_receipt()
        except BaseException:
            release_lock(lock)
            raise
        return run

    @classmethod
    def latest(cls, root: str | Path = "runs") -> Path:
        """Folder of the run that was worked on last.

        Raises:
            UserError: There is none.
        """
        receipts = [path for path in Path(root).glob(f"*/{RECEIPT}") if (path.parent / RECIPE).is_file()]
        if not receipts:
            raise UserError("there is no run yet", where=str(root), remedy="start one: qat run --recipe annie_tiny")
        return max(receipts, key=lambda path: (path.stat().st_mtime_ns, path.parent.name)).parent

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            release_lock(self._lock)
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def path(self, *parts: str) -> Path:
        """A path in the run folder."""
        return self.folder.joinpath(*parts)

    def stage(
        self,
        name: str,
        *,
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        needs: Sequence[str] = (),
        work: Sequence[str] = (),
    ) -> Stage:
        """Begin a stage; see the module's text.

        Args:
            name: As in the receipt.
            inputs: Everything that decides the result apart from `needs`; jsonable.
            outputs: Paths in the run folder that must exist at the end.
            needs: Stages whose results are read; they must be done.
            work: Further paths that hold partial progress, removed when other inputs make them worthless.

        Raises:
            UserError: A needed stage is not done.
        """
        return Stage(self, name, inputs, outputs, needs, work)

    def fingerprint(self, name: str, inputs: Mapping[str, Any], needs: Sequence[str]) -> str:
        """SHA-256 over the stage's name, inputs and, of every needed stage, fingerprint and output hashes."""
        above = {}
        for need in needs:
            record = self.record(need)
            if record.get("status") != "done" or not self.has_outputs(record, list(record["outputs"])):
                raise UserError(
                    f"stage {name} needs {need}, which is not done",
                    where=str(self.folder),
                    remedy=f"run the chain: qat run --run {self.name}",
                )
            above[need] = [record["fingerprint"], record["outputs"]]
        text = json.dumps({"stage": name, "inputs": inputs, "needs": above}, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def record(self, name: str) -> dict[str, Any]:
        """The receipt's record of a stage; empty where it never began."""
        found: dict[str, Any] = self._receipt["stages"].get(name, {})
        return found

    def has_outputs(self, record: Mapping[str, Any], outputs: Sequence[str]) -> bool:
        """All outputs are there with the size that they had; hashing them at every call would cost minutes."""
        sizes = record.get("bytes", {})
        if set(sizes) != set(outputs):
            return False
        return all(self.path(path).exists() and size_of(self.path(path)) == sizes[path] for path in sizes)

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """All records, in the order in which the stages first began."""
        return dict(self._receipt["stages"])

    def write_record(self, name: str, record: Mapping[str, Any]) -> None:
        """Put a stage's record into the receipt, on disk at once."""
        self._receipt["stages"][name] = dict(record)
        self._write_receipt()

    def _write_receipt(self) -> None:
        write_json(self.path(RECEIPT), self._receipt)

    def _load_receipt(self) -> dict[str, Any]:
        path = self.path(RECEIPT)
        head = {
            "qat": qat.__version__,
            "recipe": {"name": self.recipe.name, "sha256": self.recipe.sha256},
            "environment": environment(),
        }
        if not path.exists():
            return {**head, "stages": {}}
        stages = read_receipt(self.folder)["stages"]
        return {**head, "stages": stages}

    def _announce_changes(self) -> None:
        """Say what the recipe of an existing run now says otherwise; the stages find out for themselves."""
        path = self.path(RECIPE)
        if not path.exists():
            return
        try:
            before = load_recipe(path)
        except UserError:
            self.say(f"the recipe kept in {path} cannot be read any more and is replaced")
            return
        changed = _differences(before.model_dump(mode="json"), self.recipe.model_dump(mode="json"))
        if changed:
            self.say(f"the recipe of run {self.name} changed: {', '.join(changed)}; stages that depend on it run again")


def read_receipt(folder: Path) -> dict[str, Any]:
    """The receipt of a run folder.

    Raises:
        UserError: Missing or damaged.
    """
    path = folder / RECEIPT
    remedy = "start the run afresh with --fresh"
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            "the run has no readable receipt", where=str(path), value=error.strerror, remedy=remedy
        ) from error
    except ValueError as error:
        raise UserError("the receipt is damaged", where=str(path), value=str(error), remedy=remedy) from error
    if not isinstance(receipt, dict) or not isinstance(receipt.get("stages"), dict):
        raise UserError("the receipt is damaged", where=str(path), value="no stages in it", remedy=remedy)
    return receipt


def run_folder(root: str | Path, name: str) -> Path:
    """`<root>/<name>`.

    Raises:
        UserError: The name is no plain folder name.
    """
    if not _NAME.fullmatch(name):
        raise UserError("not a name for a run", where="--run", value=name, remedy="letters, digits, '_', '-' and '.'")
    return Path(root) / name
