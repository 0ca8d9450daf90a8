"""The probes as a test run, for any stack: `pytest --pyargs qat.patches`.

One test a defect. It fails where the installed libraries have the defect, and says what to do about it; it is skipped
where that cannot be found out. Nothing is patched.
"""

from __future__ import annotations

import pytest

from qat.patches.cache import versions
from qat.patches.protocol import Defect, Status
from qat.patches.registry import all_defects


@pytest.mark.parametrize("defect", all_defects(), ids=lambda defect: defect.name)
def test_stack_is_free_of(defect: Defect) -> None:
    """Probe one defect."""
    status, detail = defect.probe()
    installed = ", ".join(f"{library} {version}" for library, version in versions(defect).items())
    if status is Status.CANNOT_TELL:
        pytest.skip(f"{defect.name} cannot be told here ({installed}): {detail}")
    if status is Status.NEEDED:
        pytest.fail(
            f"{defect.title} ({installed})\n"
            f"observed: {detail}\nbreaks:   {defect.breaks}\nupstream: {defect.upstream}\nremedy:   {defect.repair}",
            pytrace=False,
        )
