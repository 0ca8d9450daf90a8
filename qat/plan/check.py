"""The estimates against what was measured: each step from all the others, each peak by its formula.

Seconds have fitted factors, so every case is estimated by a model that has not seen it. Peak memory has none: its
formula counts the tensors of this package's own training (`qat.train.memory`), and what it says of those cases is
compared as it is.
"""

from __future__ import annotations

from typing import NamedTuple

from qat.plan.timing import Case, case_config, leave_one_out, own_cases, timed_cases
from qat.train.memory import GIB, Need, estimate
from qat.train.shapes import network_weights


class Row(NamedTuple):
    """A measured case and what is said of it.

    Attributes:
        case: Model, batch and settings in words.
        measured: Seconds or GiB.
        estimated: The same.
        error: (estimated - measured) / measured.
    """

    case: str
    measured: float
    estimated: float
    error: float

    def cells(self) -> tuple[str, str, str, str]:
        """As texts."""
        return self.case, f"{self.measured:.3f}", f"{self.estimated:.3f}", f"{100 * self.error:+.1f} %"


def error_rows() -> list[Row]:
    """Seconds: the leave-one-out error on every measured case that the time model is for."""
    return [
        Row(_words(found.case), found.case.seconds, round(found.seconds, 3), round(found.relative, 4))
        for found in leave_one_out(timed_cases())
    ]


def memory_rows() -> list[Row]:
    """Peak memory: the formula's error on every case of our own training whose peak was written down."""
    rows = []
    for case in own_cases():
        if case.peak_gib is not None:
            estimated = case_peak(case) / GIB
            rows.append(Row(_words(case), case.peak_gib, round(estimated, 2), round(estimated / case.peak_gib - 1, 4)))
    return rows


def case_peak(case: Case) -> float:
    """Bytes at the peak of a measured case, which took one batch a step."""
    config, packed = case_config(case), []
    if case.memory == "nvfp4":
        from qat.quant.packed import packed_modules

        packed = packed_modules([], config)
    need = Need(
        memory=case.memory,
        packed=packed,
        rank=case.rank,
        targets=case.targets,
        batch_size=case.batch,
        length=case.length,
        checkpointing=case.checkpointing,
        quantized=[weight.name for weight in network_weights(config) if weight.target] if case.rounded else [],
        teacher=case.teacher,
        accumulates=False,
    )
    return estimate(config, need).total


def _words(case: Case) -> str:
    settings = "checkpointing" if case.checkpointing else "no checkpointing"
    return f"{case.way}, {case.gpu}, {case.name}, {case.batch} x {case.length}, {settings}"


def markdown() -> str:
    """Both tables, as docs/planning.md holds them."""
    lines = ["| measured step | measured, s | estimated from the others, s | error |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row.cells())} |" for row in error_rows()]
    lines += ["", "| measured peak | measured, GiB | by the formula, GiB | error |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row.cells())} |" for row in memory_rows()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
