"""The doctor: what is wrong with a checkpoint that somebody wrote, what follows when it is served, and what to do.

`folder`, `header` and `safe_json` read an untrusted folder; the `checks_…` modules are generators of findings over what
was read; `repair` writes a mended copy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.export.doctor.checks_adapter import check_adapter, check_adapter_values
from qat.export.doctor.checks_config import check_config, check_generation
from qat.export.doctor.checks_contents import check_contents
from qat.export.doctor.checks_index import check_index
from qat.export.doctor.checks_quant import check_quantization
from qat.export.doctor.checks_scales import check_blocks, check_scales
from qat.export.doctor.checks_template import check_chat_template
from qat.export.doctor.checks_tensors import check_tensors
from qat.export.doctor.checks_tokenizer import check_tokenizer
from qat.export.doctor.findings import Finding, Severity, cleaned
from qat.export.doctor.folder import CheckpointView, open_checkpoint
from qat.export.doctor.precision import CensusRow, census
from qat.export.doctor.repair import repair

__all__ = ["CensusRow", "Diagnosis", "Finding", "Severity", "diagnose", "open_checkpoint", "repair"]

#: Checks of headers, configurations and single values.
CHECKS = (
    check_index,
    check_tensors,
    check_config,
    check_generation,
    check_tokenizer,
    check_chat_template,
    check_quantization,
    check_scales,
    check_adapter,
)
#: Checks that read every byte.
DEEP_CHECKS = (check_contents, check_blocks, check_adapter_values)

_ORDER = list(Severity)


@dataclass(frozen=True)
class Diagnosis:
    """What is known about a checkpoint after it was examined.

    Attributes:
        checkpoint: The folder.
        findings: All faults, the gravest first.
        census: Its weights by kind of module and precision.
        tensors: Number of tensors.
        bytes: Their size.
        deep: Whether every byte was read.
        seconds: How long it took.
    """

    checkpoint: Path
    findings: tuple[Finding, ...]
    census: tuple[CensusRow, ...]
    tensors: int
    bytes: int
    deep: bool
    seconds: float

    @property
    def clean(self) -> bool:
        """Whether there is no error and no warning."""
        return all(finding.severity is Severity.NOTE for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Give the diagnosis as plain JSON values."""
        return {
            "checkpoint": str(self.checkpoint),
            "clean": self.clean,
            "findings": [finding._asdict() for finding in self.findings],
            "census": [{**row._asdict(), "bits_per_weight": row.bits_per_weight} for row in self.census],
            "tensors": self.tensors,
            "bytes": self.bytes,
            "deep": self.deep,
            "seconds": round(self.seconds, 3),
        }


def diagnose(checkpoint: Path, base: Path | None = None, deep: bool = False) -> Diagnosis:
    """Examine a checkpoint or adapter folder, which may come from a stranger.

    Args:
        checkpoint: The folder; nothing outside it is opened and nothing in it is executed.
        base: The checkpoint that it was made from, to compare with.
        deep: Read every byte too. Otherwise headers, configurations and single values are read.

    Raises:
        UserError: A folder cannot be read or is no checkpoint.
    """
    start = time.perf_counter()
    view = open_checkpoint(checkpoint)
    other = open_checkpoint(base) if base is not None else None
    checks = (*CHECKS, *DEEP_CHECKS) if deep else CHECKS
    found = [finding for check in checks for finding in check(view, other)]
    # Checks may read further files; what was wrong with those stands in the views.
    findings = [*view.findings, *found, *_of_base(other)]
    return Diagnosis(
        checkpoint=checkpoint,
        findings=tuple(sorted(map(cleaned, findings), key=lambda finding: _ORDER.index(finding.severity))),
        census=tuple(census(view)),
        tensors=len(view.tensors),
        bytes=sum(tensor.nbytes for tensor in view.tensors.values()),
        deep=deep,
        seconds=time.perf_counter() - start,
    )


def _of_base(base: CheckpointView | None) -> Iterator[Finding]:
    for finding in base.findings if base is not None else ():
        yield finding._replace(place=f"base: {finding.place}")
