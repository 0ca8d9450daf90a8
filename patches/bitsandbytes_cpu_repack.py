"""One forward of bitsandbytes' 4-bit layer in eval mode makes it useless for training, on some processors."""

from __future__ import annotations

import importlib
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register

_FLAG = "support_avx512bf16_for_cpu"


class BitsandbytesCpuRepack:
    """Tells every 4-bit layer, also those that exist, that the processor has no AVX512-BF16.

    The layer then keeps its weights in the layout that its training forward and `dequantize_4bit` read.
    """

    name = "bitsandbytes_cpu_repack"
    title = "bitsandbytes repacks 4-bit weights in an eval forward on AVX512-BF16 processors"
    breaks = (
        "Silent: after one evaluation without gradients the layer passes no gradient to its input, and merging or "
        "dequantizing reads garbage (relative error 1.4). \"AssertionError: N must be divisible by block_n\" where the "
        "output features are no multiple of 32."
    )
    upstream = "bitsandbytes/nn/modules.py: Linear4bit.forward, _convert_weight_packed_for_cpu"
    affects = "bitsandbytes 0.50.2 on CPUs with AVX512-BF16"
    libraries = ("bitsandbytes",)
    place = Place.HERE
    repair = (
        "qat trains on the BF16 base. Elsewhere use this patch, or set support_avx512bf16_for_cpu = False on every "
        "Linear4bit after loading, before the first evaluation."
    )

    def __init__(self) -> None:
        self._applied = False

    def probe(self) -> ProbeResult:
        """Evaluate a layer once, then train through it."""
        try:
            bitsandbytes = importlib.import_module("bitsandbytes")
        except ImportError as error:
            return ProbeResult(Status.CANNOT_TELL, f"bitsandbytes cannot be imported: {error}")
        if not bitsandbytes.functional.has_avx512bf16():
            return ProbeResult(Status.CANNOT_TELL, "this processor has no AVX512-BF16")
        return self._look(bitsandbytes)

    def _look(self, bitsandbytes: Any) -> ProbeResult:
        import torch

        layer = _layer_4bit(bitsandbytes)
        before = layer.weight.data.clone()
        with torch.no_grad():
            layer.eval()(torch.ones(4, 64, dtype=torch.bfloat16))
        repacked = layer.weight.shape != before.shape or not torch.equal(layer.weight.data, before)
        if repacked:
            shapes = f"{_shape(before)} into {_shape(layer.weight)}"
            return ProbeResult(Status.NEEDED, f"an eval forward turned packed weights of {shapes}")
        inputs = torch.ones(4, 64, dtype=torch.bfloat16, requires_grad=True)
        layer.train()(inputs).sum().backward()
        if inputs.grad is None or not bool(inputs.grad.any()):
            return ProbeResult(Status.NEEDED, "after an eval forward the input gets no gradient")
        status = Status.APPLIED if self._applied else Status.NOT_NEEDED
        return ProbeResult(status, "an eval forward leaves the weights as they are")

    def apply(self) -> None:
        """Let the class answer for its instances."""

        def remember(layer: Any, value: bool) -> None:
            layer.__dict__[_FLAG] = value

        # A property comes before what the instances hold; they keep their own value for the time after.
        setattr(_linear_4bit(), _FLAG, property(lambda _: False, remember))
        self._applied = True

    def revert(self) -> None:
        """Let the instances answer again."""
        if self._applied:
            delattr(_linear_4bit(), _FLAG)
            self._applied = False


def _linear_4bit() -> type:
    kind: type = importlib.import_module("bitsandbytes.nn").Linear4bit
    return kind


def _layer_4bit(bitsandbytes: Any) -> Any:
    """A quantized layer of 64 by 64."""
    import torch

    with torch.random.fork_rng(devices=[]):
        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    weight = torch.linspace(-1, 1, 64 * 64, dtype=torch.bfloat16).view(64, 64)
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to("cpu")


def _shape(weight: Any) -> str:
    return " x ".join(map(str, weight.shape))


register(BitsandbytesCpuRepack())
