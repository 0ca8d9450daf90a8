"""All defects by name, and the one way to be rid of them: probe, repair where needed, look again."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import TypedDict

from qat.errors import UserError
from qat.patches import cache
from qat.patches.protocol import Defect, Patch, ProbeResult, Status, Workaround

_DEFECTS: dict[str, Defect] = {}
_HANDLED: dict[str, Handled] = {}
AVOIDED = "avoided"
"""What a record says instead of `applied` where qat goes another way around the defect."""
UNKNOWN = "unknown"
"""What a record says of a defect that was not looked for."""


class Handled(TypedDict):
    """What `ensure` found and did about one defect; plain strings, so that a receipt can hold it.

    Attributes:
        name: Of the defect.
        affects: The versions in which it was seen.
        versions: Of its libraries, as installed.
        before: `needed`, `not_needed` or `cannot_tell`; `unknown` where nobody looked.
        after: `applied` or `avoided` where there was something to do, otherwise as before.
        detail: What the last look observed.
    """

    name: str
    affects: str
    versions: str
    before: str
    after: str
    detail: str


class PatchFailedError(RuntimeError):
    """A repair is in place and the defect is still seen."""


def register(defect: Defect) -> None:
    """Add a defect; each module of this package that holds one calls this when it is imported.

    Args:
        defect: A `Patch` or a `Workaround`.

    Raises:
        ValueError: Another one has this name.
        TypeError: It is neither, or both.
    """
    if isinstance(defect, Patch) == isinstance(defect, Workaround):
        raise TypeError(f"{type(defect).__name__} must be either a Patch or a Workaround")
    if _DEFECTS.get(defect.name, defect) is not defect:
        raise ValueError(f"two defects are called {defect.name}")
    _DEFECTS[defect.name] = defect


def all_defects() -> list[Defect]:
    """Every defect of this package, by name."""
    import qat.patches

    for module in pkgutil.iter_modules(qat.patches.__path__):
        if not module.name.startswith(("test_", "_")):
            importlib.import_module(f"qat.patches.{module.name}")
    return [_DEFECTS[name] for name in sorted(_DEFECTS)]


def find(*names: str) -> list[Defect]:
    """The named defects, in the order of the names.

    Raises:
        UserError: There is none of that name.
    """
    known = {defect.name: defect for defect in all_defects()}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise UserError("There is no such patch.", value=name, remedy=f"{hint}Known are {', '.join(known)}.")
    return [known[name] for name in names]


def ensure(*names: str) -> list[Handled]:
    """Make sure that the named defects do no harm in this process.

    What a probe found is remembered (`qat.patches.cache`); whether a patch really helps is looked at every time.

    Args:
        names: Names of defects.

    Returns:
        What was found and done, in the order of the names.

    Raises:
        UserError: There is no defect of that name.
        PatchFailedError: A repair does not help against what the probe sees.
    """
    done = [_ensure(defect) for defect in find(*names)]
    for entry in done:
        _HANDLED[entry["name"]] = entry
    return done


def handled() -> list[Handled]:
    """What `ensure` found and did in this process so far, for the receipt of whatever ran in it."""
    return list(_HANDLED.values())


def avoided(*names: str) -> list[Handled]:
    """What a receipt says of defects that the caller goes around with code of its own.

    Nothing is looked for here, so that it costs nothing: what is not remembered is `unknown`.

    Args:
        names: Names of defects.

    Raises:
        UserError: There is no defect of that name.
    """
    return [_around(defect) for defect in find(*names)]


def repair(defect: Defect) -> ProbeResult:
    """Apply a patch and probe again, or take a workaround's way.

    Returns:
        `NEEDED` where this does not help.
    """
    if isinstance(defect, Patch):
        defect.apply()
        return defect.probe()
    if isinstance(defect, Workaround):
        return defect.verify()
    raise TypeError(f"{defect.name} is neither a Patch nor a Workaround")


def outcome(defect: Defect, after: ProbeResult) -> str:
    """The word for what a repair came to: `applied`, `avoided`, or the status itself where it did not help."""
    avoided = isinstance(defect, Workaround) and after.status is Status.NOT_NEEDED
    return AVOIDED if avoided else after.status.value


def _around(defect: Defect) -> Handled:
    known = cache.recall(defect, "probe")
    if known is None:
        return _record(defect, UNKNOWN, AVOIDED, "not looked for in this stack yet; `qat patches list` does")
    return _record(defect, known.result.status.value, AVOIDED, known.result.detail)


def _ensure(defect: Defect) -> Handled:
    before = cache.through(defect, "probe", defect.probe)
    after, word = before, before.status.value
    if before.status is Status.NEEDED:
        after = repair(defect) if isinstance(defect, Patch) else cache.through(defect, "repair", lambda: repair(defect))
        word = outcome(defect, after)
        if after.status is Status.NEEDED:
            raise PatchFailedError(f"{defect.name}: the repair is in place and the defect still there: {after.detail}")
    return _record(defect, before.status.value, word, after.detail)


def _record(defect: Defect, before: str, after: str, detail: str) -> Handled:
    versions = ", ".join(f"{library} {version}" for library, version in cache.versions(defect).items())
    return Handled(
        name=defect.name, affects=defect.affects, versions=versions, before=before, after=after, detail=detail
    )
