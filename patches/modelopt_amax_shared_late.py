"""ModelOpt gives q/k/v and gate/up one range at export, after training with three and two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qat.patches.guard import FUSED_WHEN_SERVED
from qat.patches.modelopt_int8 import quantize_int8
from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch


class ModelOptAmaxSharedLate(ReplacingPatch):
    """Shares the ranges right after every calibration, so that training sees what export writes."""

    name = "modelopt_amax_shared_late"
    title = "Ranges of q/k/v and gate/up are shared only at export"
    breaks = (
        "Silent: the served weights are not those of the trained forward. In tiny models 2 of 26 (Nemotron-H) and 6 of "
        "14 (Qwen3) quantized weights differed, in 83-93 % of their values."
    )
    upstream = "modelopt/torch/export/quant_utils.py: preprocess_linear_fusion, called by export_hf_checkpoint"
    affects = "nvidia-modelopt 0.47, every format with one range per tensor"
    libraries = ("nvidia-modelopt",)
    place = Place.HERE
    repair = (
        "qat shares the ranges after its calibration, keeps them shared in training, and compares every exported byte "
        "with the forward's. With ModelOpt's trainer and export use this patch, or set the largest amax of each group "
        "right after mtq.quantize."
    )

    def probe(self) -> ProbeResult:
        """Calibrate q, k and v with weights of different size, then fuse them as export does."""
        import torch
        from modelopt.torch.export.quant_utils import preprocess_linear_fusion

        attention = _attention()
        quantize_int8(attention, lambda layer: layer(torch.ones(2, 16)))
        linears: list[Any] = [attention.get_submodule(name) for name in FUSED_WHEN_SERVED[0]]
        trained = [linear.weight_quantizer(linear.weight) for linear in linears]
        preprocess_linear_fusion(linears)
        exported = [linear.weight_quantizer(linear.weight) for linear in linears]
        different = [float((a != b).float().mean()) for a, b in zip(trained, exported, strict=True)]
        if any(different):
            text = ", ".join(f"{share:.0%}" for share in different)
            return ProbeResult(Status.NEEDED, f"export changes {text} of the quantized values of q, k and v")
        return self.absent("export changes no quantized value of q, k and v")

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """Calibration, where `mtq.quantize` and where callers look it up."""
        import modelopt.torch.quantization as mtq

        yield mtq.model_quant, "calibrate", _calibrate_and_share
        yield mtq, "calibrate", _calibrate_and_share


def _attention() -> Any:
    """Three projections of one input, with weights up to 1, 2 and 3."""
    import torch

    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outputs: list[torch.Tensor] = [self.get_submodule(name)(x) for name in FUSED_WHEN_SERVED[0]]
            return torch.stack(outputs).sum(0)

    attention = Attention()
    with torch.random.fork_rng(devices=[]):
        for largest, name in enumerate(FUSED_WHEN_SERVED[0], start=1):
            linear = torch.nn.Linear(16, 16, bias=False).requires_grad_(False)
            linear.weight.copy_(torch.linspace(-largest, largest, 256).view(16, 16))
            attention.add_module(name, linear)
    return attention


def _calibrate_and_share(calibrate: Around, model: Any, *args: Any, **kwargs: Any) -> Any:
    calibrated = calibrate(model, *args, **kwargs)
    for module in calibrated.modules():
        for family in FUSED_WHEN_SERVED:
            members = [getattr(module, name, None) for name in family]
            for kind in ("weight_quantizer", "input_quantizer"):
                _share([getattr(member, kind, None) for member in members])
    return calibrated


def _share(quantizers: list[Any]) -> None:
    """Give the enabled quantizers with one range each the largest of theirs."""
    import torch

    static = [
        quantizer
        for quantizer in quantizers
        if getattr(quantizer, "is_enabled", False) and (amax := getattr(quantizer, "amax", None)) is not None
        if amax.numel() == 1
    ]
    if len(static) > 1:
        largest = torch.stack([quantizer.amax for quantizer in static]).amax(0)
        for quantizer in static:
            quantizer.amax = largest


register(ModelOptAmaxSharedLate())
