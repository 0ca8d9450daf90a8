"""What the known GPUs can do, by their makers' data sheets."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from qat.errors import UserError

GIB = float(1 << 30)


class Gpu(NamedTuple):
    """One GPU.

    Attributes:
        name: As `--gpu` takes it.
        title: The maker's name.
        memory: Bytes that a process can have.
        bandwidth: Bytes a second.
        flops: BF16 tensor-core products with float32 sums, dense, operations a second.
        source: Where the figures come from.
    """

    name: str
    title: str
    memory: float
    bandwidth: float
    flops: float
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "h100",
            "NVIDIA H100 SXM, 80 GB",
            79.1 * GIB,
            3.35e12,
            989e12,
            "NVIDIA H100 data sheet: 80 GB, 3.35 TB/s, 1,979 TFLOPS BF16 with sparsity, half of it dense",
        ),
        Gpu(
            "h200",
            "NVIDIA H200 SXM, 141 GB",
            139.8 * GIB,
            4.8e12,
            989e12,
            "NVIDIA H200 data sheet: 141 GB, 4.8 TB/s, 1,979 TFLOPS BF16 with sparsity, half of it dense",
        ),
        Gpu(
            "b200",
            "NVIDIA B200, 180 GB",
            178.0 * GIB,
            8.0e12,
            2250e12,
            "NVIDIA DGX B200 data sheet: 8 GPUs, 1,440 GB, 64 TB/s, 36 PFLOPS BF16 with sparsity, half of it dense",
        ),
        Gpu(
            "dgx-spark",
            "NVIDIA DGX Spark (GB10), 128 GB shared with the processor",
            119.0 * GIB,
            0.273e12,
            125e12,
            "NVIDIA DGX Spark data sheet: 128 GB, 273 GB/s, 1 PFLOP FP4 with sparsity; BF16 is not stated: an eighth",
        ),
    )
}
"""By name."""


def find_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UserError: It is not known.
    """
    wanted = name.lower().replace(" ", "-").replace("_", "-")
    if wanted in GPUS:
        return GPUS[wanted]
    near = difflib.get_close_matches(wanted, GPUS, n=1)
    raise UserError(
        "There is no such GPU in the list.",
        where="--gpu",
        value=name,
        remedy=(f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(GPUS)}",
    )
