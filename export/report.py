"""What an export did: counts, sizes, hashes, precisions and the outcome of its verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from qat.errors import UserError
from qat.export.config import ALGORITHMS
from qat.export.pack import Step


class Precision(NamedTuple):
    """Share of one precision in a checkpoint.

    Attributes:
        tensors: Number of tensors on disk, scales included.
        parameters: Number of weights that they stand for.
        bytes: Size on disk, scales included.
    """

    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class VerifyReport:
    """Outcome of `verify_export`.

    Attributes:
        packed_tensors: Packed weights that were compared.
        merged_tensors: Merged BF16 weights that were compared.
        copied_tensors: Tensors that were compared with the base byte for byte.
        compared_bytes: Bytes that were compared in all.
        differing_bytes: Bytes that differ from what the forward uses.
        differing_values: Dequantized weights that differ from `fake_quant_weight` of the effective weight.
        faults: One line per fault, at most 20.
    """

    packed_tensors: int
    merged_tensors: int
    copied_tensors: int
    compared_bytes: int
    differing_bytes: int
    differing_values: int
    faults: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Give the report as plain JSON values."""
        return {**asdict(self), "faults": list(self.faults)}


class ExportMismatch(UserError):
    """The export is not what the forward uses; `report` holds the counts."""

    def __init__(self, where: str, report: VerifyReport) -> None:
        self.report = report
        super().__init__(
            "The exported checkpoint differs from what the network was trained with.",
            where=where,
            value="; ".join(report.faults[:3]),
            remedy="Check that base, adapters and quantizer state are those of the export; else export again.",
        )


@dataclass(frozen=True)
class ExportReport:
    """Outcome of `export_checkpoint`; also written into the folder as `export.json`.

    Attributes:
        tensors: Tensors in the export.
        packed: Base tensors that were packed to NVFP4 or FP8.
        merged: Base tensors that were changed by an adapter and kept their precision.
        copied: Base tensors that were copied byte for byte.
        bytes: Tensor bytes in the export.
        excluded: `exclude_modules` of the quantization configuration.
        sha256: Digest of every file but `export.json`, by its name in the folder.
        precisions: Census by precision: `NVFP4`, `W4A16_NVFP4`, `FP8`, `BF16`, `F32`, …
        verification: What re-reading the export showed.
        base_sha256: Digest of the base (`qat.quant.state`), None where nothing asked for it.
        adapters: Digests of the adapters' weight files, in the order of application.
        packed_base: Modules of the base that went through NVFP4 before the adapters, which were trained on a packed
            base; their weights are dequant(Q(W)) + s B A.
    """

    tensors: int
    packed: int
    merged: int
    copied: int
    bytes: int
    excluded: list[str]
    sha256: dict[str, str]
    precisions: dict[str, Precision]
    verification: VerifyReport
    base_sha256: str | None
    adapters: list[str]
    packed_base: int = 0

    def to_json(self) -> dict[str, Any]:
        """Give the report as plain JSON values."""
        precisions = {name: precision._asdict() for name, precision in self.precisions.items()}
        return {**asdict(self), "precisions": precisions, "verification": self.verification.to_json()}


def census(plan: Sequence[Step]) -> dict[str, Precision]:
    """Count tensors, parameters and bytes of a planned export by precision, the largest share first."""
    counted: dict[str, list[int]] = {}
    for step in plan:
        for output in step.outputs:
            name = output.dtype if step.state is None else ALGORITHMS[step.state.format]
            elements = 1
            for extent in output.shape:
                elements *= extent
            if step.state is not None:
                # Two NVFP4 weights lie in one byte; the scales stand for none.
                elements = 0 if not output.name.endswith(".weight") else elements * (2 if output.dtype == "U8" else 1)
            totals = counted.setdefault(name, [0, 0, 0])
            for place, amount in enumerate((1, elements, output.nbytes)):
                totals[place] += amount
    ordered: Mapping[str, list[int]] = dict(sorted(counted.items(), key=lambda item: (-item[1][2], item[0])))
    return {name: Precision(*totals) for name, totals in ordered.items()}
