"""How a range follows from what passed a quantizer: ModelOpt's calibrators, fitted to floating-point formats.

`max` takes the largest magnitude. `percentile` (activations only) leaves out the rarest magnitudes. `mse` searches the
range with the smallest squared error among multiples of the largest magnitude, in a second pass over the data.

Weights are never clipped, by any of the three: their range is part of the training's state, where it may only grow
(`qat.train.ranges`). So `mse` looks for weight ranges in one octave above the maximum. That is a whole search: twice
the tensor scale halves every E4M3 block scale, which has the same digits then unless it is subnormal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from modelopt.torch.quantization.calib import HistogramCalibrator, MaxCalibrator
from modelopt.torch.quantization.calib.mse import MseCalibrator
from torch import Tensor

ALGORITHMS = ("max", "mse", "percentile")
"""What `calibrate` knows; the recipe's `quant.calibration.algorithm`."""

_STEP = 1 / 32
_ACTIVATION_STEP = 1 / 16

FakeQuant = Callable[[Tensor, Tensor], Tensor]


class PerExpertMax(MaxCalibrator):
    """Collects one range per expert from weights of shape (experts, out, in)."""

    _calib_amax: Tensor | None

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Take the maximum of |x| over each expert's matrix."""
        amax = x.abs().amax(dim=(1, 2))
        self._calib_amax = amax if self._calib_amax is None else torch.maximum(self._calib_amax, amax)


class Percentile(HistogramCalibrator):
    """The magnitude below which a share of all elements lies, to a 2,048th of the first batch's largest.

    ModelOpt reads the lower edge of the bin in which the percentile falls.

    Args:
        percentile: In percent, above 0; 100 is the largest magnitude.
    """

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self._percentile = percentile
        self._device = torch.device("cpu")

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Add the magnitudes to the histogram."""
        self._device = x.device
        super().collect(x)

    def compute_amax(self) -> Tensor | None:
        """The range, float32 (); None where nothing was seen."""
        amax: Tensor | None = super().compute_amax("percentile", percentile=self._percentile)
        return None if amax is None else amax.to(self._device, torch.float32)


class WeightMse(MseCalibrator):
    """The range of a weight with the smallest squared error, from its maximum up to twice that.

    Args:
        amax: The maximum, () or (experts,).
        function: The weight's fake quantization.
    """

    def __init__(self, amax: Tensor, function: FakeQuant) -> None:
        axis = 0 if amax.dim() else None
        super().__init__(amax.float(), axis, _STEP, 1.0, 2.0 - _STEP, function)

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Try every candidate on the weight; once, since it is the same in every forward."""
        if self._losses_sum is None:
            super().collect(x)


class ActivationMse(MseCalibrator):
    """The range of an activation with the smallest squared error, from a quarter of its maximum to twice that.

    Args:
        amax: The maximum, ().
        function: The activation's fake quantization.
    """

    def __init__(self, amax: Tensor, function: FakeQuant) -> None:
        super().__init__(amax.float(), None, _ACTIVATION_STEP, 0.25, 2.0, function)
