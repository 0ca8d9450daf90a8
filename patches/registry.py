"""All patches by name, and the one way to apply them: probe, apply where needed, probe again."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypedDict

from qat.errors import UserError
from qat.patches.protocol import Patch, ProbeResult, Status

_PATCHES: dict[str, Patch] = {}
_NO_PATCHES = ("protocol", "registry", "guard")


class AppliedPatch(TypedDict):
    """What `ensure` did about one patch; plain strings, so that a receipt can hold it.

    Attributes:
        name: Of the patch.
        affects: The versions in which the defect was seen.
        before: `needed`, `not_needed`, `applied` or `cannot_tell`.
        after: The same after `ensure`.
        detail: What the last probe observed.
    """

    name: str
    affects: str
    before: str
    after: str
    detail: str


class PatchFailedError(RuntimeError):
    """A patch was applied and its own probe still sees the defect."""


def register(patch: Patch) -> None:
    """Add a patch; each module of this package that holds one calls this when it is imported.

    Args:
        patch: The patch.

    Raises:
        ValueError: Another patch has this name.
    """
    if _PATCHES.get(patch.name, patch) is not patch:
        raise ValueError(f"two patches are called {patch.name}")
    _PATCHES[patch.name] = patch


def all_patches() -> list[Patch]:
    """Every patch of this package, by name."""
    import qat.patches

    for module in pkgutil.iter_modules(qat.patches.__path__):
        if module.name not in _NO_PATCHES:
            importlib.import_module(f"qat.patches.{module.name}")
    return [_PATCHES[name] for name in sorted(_PATCHES)]


def ensure(*names: str) -> list[AppliedPatch]:
    """Make sure that the named defects are absent from this process.

    Args:
        names: Names of patches; none means all.

    Returns:
        What was found and done, in the order of the names.

    Raises:
        UserError: There is no patch of that name.
        PatchFailedError: A patch does not repair what its probe sees.
    """
    known = {patch.name: patch for patch in all_patches()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError("There is no such patch.", value=unknown[0], remedy=f"Known are {', '.join(known)}.")
    return [_ensure(known[name]) for name in names or known]


def _ensure(patch: Patch) -> AppliedPatch:
    before = patch.probe()
    after = before
    if before.status is Status.NEEDED:
        patch.apply()
        after = patch.probe()
        if after.status is Status.NEEDED:
            raise PatchFailedError(f"{patch.name} was applied and the defect is still there: {after.detail}")
    return _record(patch, before, after)


def _record(patch: Patch, before: ProbeResult, after: ProbeResult) -> AppliedPatch:
    return AppliedPatch(
        name=patch.name,
        affects=patch.affects,
        before=before.status.value,
        after=after.status.value,
        detail=after.detail,
    )
