"""`doctor`: a checkpoint's health, and a mended copy of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qat.commands.common import JsonOption, emit, exits, print_table
from qat.errors import ExitCode

if TYPE_CHECKING:
    from qat.export.doctor import CensusRow, Diagnosis


@exits()
def doctor(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint or adapter, whoever wrote it.")],
    base: Annotated[Path | None, typer.Option("--base", help="Checkpoint that it was made from, to compare.")] = None,
    fix: Annotated[Path | None, typer.Option("--fix", help="Write a mended copy into this new folder.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte, not headers and configurations only.")] = False,
    json_: JsonOption = False,
) -> ExitCode:
    """Say what is wrong with a checkpoint and what follows when it is served.

    Exit 0: clean, notes aside; 1: errors or warnings (with --fix: that are left in the mended copy); 2: unreadable.
    """
    from qat.export.doctor import diagnose, repair

    before = diagnose(checkpoint, base, deep)
    if fix is None:
        emit(before.to_json(), json_, lambda: _print(before))
        return ExitCode.DONE if before.clean else ExitCode.FAIL
    steps = repair(checkpoint, base, fix)
    after = diagnose(fix, base, deep) if steps else before
    result = before.to_json() | {"repaired": steps, "left": [finding._asdict() for finding in after.findings]}

    def text() -> None:
        _print(before)
        print("\nmended:" if steps else "\nNothing here can be mended; nothing was written.")
        for step in steps:
            print(f"  {step}")
        if steps:
            print(f"\nleft in {fix}:")
            _print(after)

    emit(result, json_, text)
    return ExitCode.DONE if after.clean else ExitCode.FAIL


def _print(diagnosis: Diagnosis) -> None:
    columns: tuple[str, ...]
    if diagnosis.findings:
        columns = ("severity", "finding", "place", "problem", "consequence", "remedy")
        rows = [
            (str(found.severity), found.code, found.place, found.problem, found.consequence, found.remedy)
            for found in diagnosis.findings
        ]
        print_table(columns, rows, left=columns)
        print()
    if diagnosis.census:
        columns = ("module", "precision", "tensors", "weights", "bytes", "bits/weight")
        print_table(columns, [_census_cells(row) for row in diagnosis.census], left=("precision",))
    counted = {"error": 0, "warning": 0, "note": 0}
    for found in diagnosis.findings:
        counted[str(found.severity)] += 1
    said = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counted.items())
    how = "every byte" if diagnosis.deep else "headers and configurations"
    print(f"{diagnosis.checkpoint}: {said}; {diagnosis.tensors} tensors, {how} read in {diagnosis.seconds:.1f} s")


def _census_cells(row: CensusRow) -> tuple[str, ...]:
    amounts = (f"{row.modules:,}", f"{row.parameters:,}", f"{row.bytes:,}", f"{row.bits_per_weight:.2f}")
    return (row.kind, row.precision, *amounts)
