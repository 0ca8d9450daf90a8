"""Every registered defect: it says what it has to, its probe leaves no trace, its repair holds and comes off."""

from __future__ import annotations

import os
import random
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

from qat.patches.protocol import Defect, Patch, Place, Status, Workaround
from qat.patches.registry import all_defects

HERE = [defect for defect in all_defects() if defect.place is not Place.ENGINE]
IN_THE_ENGINE = [defect for defect in all_defects() if defect.place is Place.ENGINE]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    revert_all()
    yield
    revert_all()


def revert_all() -> None:
    for defect in all_defects():
        if isinstance(defect, Patch):
            defect.revert()


def traces() -> dict[str, Any]:
    """What a probe could leave behind in its process."""
    return {
        "torch's random numbers": torch.get_rng_state().tolist(),
        "Python's random numbers": random.getstate(),
        "numpy's random numbers": str(numpy.random.get_state()),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "warning filters": list(warnings.filters),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "import path": list(sys.path),
    }


@pytest.mark.parametrize("defect", all_defects(), ids=lambda defect: defect.name)
def test_it_says_what_it_is(defect: Defect) -> None:
    assert type(defect).__module__ == f"qat.patches.{defect.name}"
    assert isinstance(defect, Patch) != isinstance(defect, Workaround)
    for text in (defect.title, defect.breaks, defect.upstream, defect.affects, defect.repair):
        assert len(text) > 5 and text == " ".join(text.split())
    assert not defect.title.endswith(".") and len(defect.title) <= 110
    assert '"' in defect.breaks or defect.breaks.startswith("Silent"), "the exact error text in quotes, or Silent"
    assert isinstance(defect.libraries, tuple) and defect.libraries
    assert all(library == library.lower().replace("_", "-") for library in defect.libraries), "distribution names"
    assert isinstance(defect.place, Place)


@pytest.mark.parametrize("defect", HERE, ids=lambda defect: defect.name)
def test_a_probe_is_quick_and_leaves_no_trace(defect: Defect, capfd: pytest.CaptureFixture[str]) -> None:
    defect.probe()  # imports
    before = traces()
    capfd.readouterr()
    start = time.monotonic()
    first = defect.probe()
    assert time.monotonic() - start < 2
    assert traces() == before
    assert capfd.readouterr() == ("", "")
    assert defect.probe() == first
    assert first.detail and "\n" not in first.detail


@pytest.mark.parametrize("defect", HERE, ids=lambda defect: defect.name)
def test_the_repair_holds_and_comes_off(defect: Defect, capfd: pytest.CaptureFixture[str]) -> None:
    first = defect.probe()
    assert first.status is not Status.APPLIED
    if first.status is Status.CANNOT_TELL:
        pytest.skip(f"tested on a minimal case of its own: {first.detail}")
    if isinstance(defect, Workaround):
        if first.status is Status.NEEDED:
            defect.verify()  # imports
            before = traces()
            assert defect.verify().status is Status.NOT_NEEDED
            assert traces() == before
        return
    assert isinstance(defect, Patch)
    defect.revert()  # nothing to take out
    defect.apply()
    once = defect.probe()
    assert once.status is Status.APPLIED
    defect.apply()
    assert defect.probe() == once
    defect.revert()
    assert defect.probe() == first
    defect.revert()
    assert defect.probe() == first


def test_patches_do_not_touch_each_other() -> None:
    """What is remembered of one defect must not depend on which patches were on when it was looked at."""
    first = {defect.name: defect.probe().status for defect in HERE}
    there = [defect for defect in HERE if first[defect.name] is not Status.CANNOT_TELL]
    patches = [defect for defect in there if isinstance(defect, Patch)]
    for patch in patches:
        patch.apply()
    # Each taken out alone, with all the others on.
    for defect in there:
        if isinstance(defect, Patch):
            defect.revert()
        assert defect.probe().status is first[defect.name], defect.name
        if isinstance(defect, Patch):
            defect.apply()


def test_what_receipts_name_exists() -> None:
    from qat.patches.stages import AROUND

    known = {defect.name for defect in all_defects()}
    assert all(set(names) <= known and list(names) == sorted(names) for names in AROUND.values())
    # All that runs in vLLM is gone around when serving, on one device or the other.
    assert {name for stage, names in AROUND.items() if stage.startswith("serve") for name in names} == {
        defect.name for defect in IN_THE_ENGINE
    }


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("defect", IN_THE_ENGINE, ids=lambda defect: defect.name)
def test_engine_defects_are_held_off(defect: Defect) -> None:
    before = traces()
    first = defect.probe()
    assert traces() == before and first.detail
    if first.status is Status.NEEDED and isinstance(defect, Workaround):
        assert defect.verify().status is Status.NOT_NEEDED
