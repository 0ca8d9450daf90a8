"""Quantization in the forward: ModelOpt's quantizers around our arithmetic, inserted where the preset says.

ModelOpt keeps the insertion, the calibration and the on/off switches; what a quantizer computes is `qat.quant.nvfp4` or
`qat.quant.fp8` through a registered backend, fused experts and LoRA layers are classes in ModelOpt's registry of
quantized modules.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.calib import MaxCalibrator
from modelopt.torch.quantization.nn import TensorQuantizer, register_quant_backend
from modelopt.torch.quantization.nn.modules.tensor_quantizer import is_registered_quant_backend
from torch import Tensor, nn

from qat.errors import UserError
from qat.patches.registry import ensure
from qat.quant import fp8, nvfp4
from qat.quant.calibrators import ALGORITHMS, ActivationMse, Percentile, PerExpertMax, WeightMse
from qat.quant.experts import QuantFusedExperts, register_fused_experts
from qat.quant.lora import QuantLoraLinear, register_lora, require_plain_lora
from qat.quant.names import checkpoint_name, sharing_groups
from qat.quant.presets import FP8, NVFP4, W4A16, Preset
from qat.quant.state import ModuleState, QuantState

BACKEND = "qat_nvfp4"
"""Name of the backend in ModelOpt's registry."""

# What ModelOpt records of a format; the backend computes it.
_E2M1: dict[str, Any] = {
    "num_bits": (2, 1),
    "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
    "backend": BACKEND,
}
_E4M3: dict[str, Any] = {"num_bits": (4, 3), "block_sizes": None, "backend": BACKEND}
_ATTRIBUTES = {NVFP4: _E2M1, W4A16: _E2M1, FP8: _E4M3}
# (format, operand) -> what a quantizer computes; W4A16 leaves activations alone.
_FUNCTIONS = {
    (NVFP4, "weight"): nvfp4.fake_quant_weight,
    (NVFP4, "input"): nvfp4.fake_quant_activation,
    (W4A16, "weight"): nvfp4.fake_quant_weight,
    (FP8, "weight"): fp8.fake_quant_weight,
    (FP8, "input"): fp8.fake_quant_activation,
}

# The repairs without which quantizers would be bypassed or the teacher changed.
_PATCHES = {"": ("modelopt_eager_experts",), "nemotron_h": ("modelopt_eager_experts", "nemotron_h_fused_mamba")}


class Quantizers(NamedTuple):
    """The two quantizers of one module.

    Attributes:
        weight: Holds one range; for fused experts one per expert.
        input: Holds one range; has none and is off where activations are left alone (`w4a16`).
    """

    weight: TensorQuantizer
    input: TensorQuantizer

    def used(self) -> dict[str, TensorQuantizer]:
        """Those of the two that the module's format has, by operand."""
        has_input = (quantization_format(self), "input") in _FUNCTIONS
        return {"weight": self.weight, **({"input": self.input} if has_input else {})}


class Inserted(NamedTuple):
    """What `insert_quantizers` did, for the receipt.

    Attributes:
        preset: Name of the preset.
        quantized: Checkpoint names of the modules that have quantizers now.
        skipped: Checkpoint names of the linears and fused experts that stay in BF16.
        excluded: The preset's list for `hf_quant_config.json`.
    """

    preset: str
    quantized: list[str]
    skipped: list[str]
    excluded: list[str]


class _StraightThrough(torch.autograd.Function):
    """Fake quantization whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return function(x, amax)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def _fake_quantize(x: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """The backend's entry point; the quantizer's extra arguments say which arithmetic applies."""
    amax = getattr(quantizer, "_amax", None)
    if amax is None:
        raise RuntimeError("a quantizer ran before it was calibrated")
    fused: Callable[[Tensor, Tensor], Tensor] | None = quantizer.__dict__.get("_qat_fused")
    if fused is not None:  # `qat.quant.products.computing`
        return fused(x, amax)
    quantized: Tensor = _StraightThrough.apply(x, amax, _function(quantizer))  # type: ignore[no-untyped-call]
    return quantized


def insert_quantizers(model: nn.Module, preset: str | Preset, config: Mapping[str, Any]) -> Inserted:
    """Put quantizers where the preset says and nowhere else. Calibrate afterwards.

    Args:
        model: Plain, or with PEFT adapters (fresh ones included); weights in BF16 or FP32. Changed in place.
        preset: The precision preset, or the name of a shipped one.
        config: The base's `config.json`.

    Returns:
        What was matched and what was left out.

    Raises:
        UserError: The preset does not fit the model, names a module that the model does not have, or an adapter cannot
            be quantized.
    """
    preset = Preset(preset) if isinstance(preset, str) else preset
    chosen, excluded = preset.formats(config), preset.excludes(config)
    require_plain_lora(model)
    ensure(*_PATCHES.get(str(config["model_type"]), _PATCHES[""]))
    if not is_registered_quant_backend(BACKEND):
        register_quant_backend(BACKEND, _fake_quantize)
    register_lora()
    register_fused_experts(model)
    with contextlib.redirect_stdout(io.StringIO()):  # ModelOpt prints its progress
        mtq.quantize(model, {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None})
    present = _quantizable(model, str(config["model_type"]))
    missing = [name for name in chosen if name not in present]
    if missing:
        raise UserError(
            f"The preset names {len(missing)} modules that the model does not have.",
            where="config.json",
            value=missing[0],
            remedy="The configuration does not describe this model: use the base's own config.json.",
        )
    for name, kind in chosen.items():
        _configure(present[name], kind)
    inserted = {name: present[name] for name in chosen}
    base: nn.Module = getattr(model, "get_base_model", lambda: model)()
    for holder in (model, base):  # whoever holds only one of the two finds them
        holder.__dict__["_qat_modules"] = inserted
    return Inserted(preset.name, list(chosen), [name for name in present if name not in chosen], excluded)


def calibrate(
    model: nn.Module,
    forward_loop: Callable[[nn.Module], None],
    *,
    algorithm: str = "max",
    percentile: float = 99.99,
) -> list[list[str]]:
    """Set every range from data, then share ranges among modules that a server fuses.

    Args:
        model: After `insert_quantizers`; active adapters count.
        forward_loop: Runs the calibration samples through the model (without gradients is enough). It is called twice
            for `mse`.
        algorithm: One of `qat.quant.calibrators.ALGORITHMS`.
        percentile: Of the activations' magnitudes, in percent; for `percentile` alone.

    Returns:
        The groups that share ranges.

    Raises:
        UserError: A module saw no data, or a range is zero or not finite.
    """
    if algorithm not in ALGORITHMS:
        raise UserError("Unknown calibration algorithm.", value=algorithm, remedy=", ".join(ALGORITHMS))
    used = {name: pair.used() for name, pair in quantizers(model).items()}
    for pair in quantizers(model).values():
        pair.weight._calibrator = PerExpertMax((2, 1), None, False) if _range_shape(pair) else MaxCalibrator()
        pair.input._calibrator = Percentile(percentile) if algorithm == "percentile" else MaxCalibrator()
        for quantizer in pair:
            quantizer.reset_amax()
    _collect(model, forward_loop, used)
    if algorithm == "mse":
        for operands in used.values():
            for operand, quantizer in operands.items():
                search = WeightMse if operand == "weight" else ActivationMse
                quantizer._calibrator = search(quantizer._amax, _function(quantizer))
        _collect(model, forward_loop, used)
    return share_amax(model)


def _collect(
    model: nn.Module, forward_loop: Callable[[nn.Module], None], used: Mapping[str, Mapping[str, TensorQuantizer]]
) -> None:
    """Let the quantizers' calibrators see the data and take over what they found."""
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        # ModelOpt's `max` runs whatever calibrator a quantizer has; its own `mse` passes over activations, and over
        # weights that are calibrated in the forward.
        mtq.calibrate(model, algorithm="max", forward_loop=forward_loop)
    for name, operands in used.items():
        for operand, quantizer in operands.items():
            amax = getattr(quantizer, "_amax", None)
            if amax is None or not bool((torch.isfinite(amax) & (amax > 0)).all()):
                raise UserError(
                    f"The calibration found no usable {operand} range.",
                    where=name,
                    value=None if amax is None else amax.tolist(),
                    remedy="The samples never reach this module, its weights or inputs are all zero or not finite, or "
                    "more of them are zero than the percentile leaves.",
                )
            _set_amax(quantizer, amax)


def share_amax(model: nn.Module) -> list[list[str]]:
    """Give modules that a server fuses (q/k/v, gate/up) the largest range among them.

    Args:
        model: Calibrated.

    Returns:
        The groups, by the checkpoint's names.
    """
    modules = quantizers(model)
    groups = sharing_groups(modules)
    for group in groups:
        for operand in modules[group[0]].used():
            members = [modules[name].used()[operand] for name in group]
            largest = torch.stack([quantizer._amax for quantizer in members]).amax(0)
            for quantizer in members:
                _set_amax(quantizer, largest)
    return groups


def quantizers(model: nn.Module) -> dict[str, Quantizers]:
    """The quantizers that were inserted, enabled or not, by the checkpoint's module name.

    Raises:
        TypeError: The model has none.
    """
    modules: dict[str, Quantizers] | None = model.__dict__.get("_qat_modules")
    if modules is None:
        raise TypeError("the model has no quantizers: call insert_quantizers first")
    return modules


@contextlib.contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """The network without quantization, bit for bit: with adapters disabled as well it is the teacher."""
    enabled = [quantizer for pair in quantizers(model).values() for quantizer in pair if quantizer.is_enabled]
    for quantizer in enabled:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in enabled:
            quantizer.enable()


def collect_state(
    model: nn.Module, inserted: Inserted, *, kv_cache: str, base_sha256: str, adapter: str | None = None
) -> QuantState:
    """Gather what export needs.

    Args:
        model: Calibrated.
        inserted: What `insert_quantizers` returned for it.
        kv_cache: `bf16` or `fp8`.
        base_sha256: Digest of the base checkpoint.
        adapter: Folder of the adapter, relative to where the state will be saved.

    Returns:
        The state, on the CPU.
    """
    pairs = quantizers(model)
    modules = {}
    for name, pair in pairs.items():
        ranges = {operand: _range(quantizer) for operand, quantizer in pair.used().items()}
        modules[name] = ModuleState(ranges["weight"], ranges.get("input"), quantization_format(pair))
    return QuantState(
        modules=modules,
        preset=inserted.preset,
        kv_cache=kv_cache,
        groups=sharing_groups(pairs),
        excluded=list(inserted.excluded),
        base_sha256=base_sha256,
        adapter=adapter,
    )


def load_state_into(model: nn.Module, state: QuantState) -> None:
    """Set every range from a saved state instead of calibrating.

    Args:
        model: After `insert_quantizers` with the state's preset.
        state: The saved state.

    Raises:
        UserError: The state belongs to other modules or other shapes than the model has.
    """
    pairs = quantizers(model)
    if set(pairs) != set(state.modules):
        different = sorted(set(pairs) ^ set(state.modules))
        raise UserError(
            f"The quantizer state does not fit the model: {len(different)} modules are in one of them only.",
            where=different[0],
            value=f"preset {state.preset}",
            remedy="Use the state that was made with this base and preset.",
        )
    for name, pair in pairs.items():
        saved = state.modules[name]
        expected = _range_shape(pair)
        if tuple(saved.weight_amax.shape) != expected:
            raise UserError(
                "The quantizer state has ranges of another shape than the model.",
                where=name,
                value=f"{tuple(saved.weight_amax.shape)}, not {expected}",
                remedy="Use the state that was made with this base and preset.",
            )
        if saved.format != quantization_format(pair):
            raise UserError(
                "The quantizer state has another format than the preset asks for.",
                where=name,
                value=f"{saved.format}, not {quantization_format(pair)}",
                remedy="Use the state that was made with this base and preset.",
            )
        _set_amax(pair.weight, saved.weight_amax)
        if saved.input_amax is not None:
            _set_amax(pair.input, saved.input_amax)


def _quantizable(model: nn.Module, model_type: str) -> dict[str, Quantizers]:
    """Every module that could be quantized: LoRA linears, plain linears outside of them, fused expert parameters."""
    found: dict[str, Quantizers] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue  # base_layer, lora_A and lora_B of a LoRA linear are no modules of the checkpoint
        if isinstance(module, QuantFusedExperts):
            for parameter in module.projection_names:
                pair = (getattr(module, f"{parameter}_{kind}_quantizer") for kind in ("weight", "input"))
                found[checkpoint_name(f"{name}.{parameter}", model_type)] = Quantizers(*pair)
                getattr(module, f"{parameter}_weight_quantizer").__dict__["_qat_experts"] = module.num_experts
        elif isinstance(module, QuantLoraLinear) or (isinstance(module, nn.Linear) and ".lora_" not in name):
            inside = (*inside, f"{name}.") if isinstance(module, QuantLoraLinear) else inside
            found[checkpoint_name(name, model_type)] = Quantizers(module.weight_quantizer, module.input_quantizer)
    return found


def quantization_format(pair: Quantizers) -> str:
    """What a module is quantized to: one of `qat.quant.presets.FORMATS`."""
    kind: str = pair.weight.backend_extra_args["format"]
    return kind


def _configure(pair: Quantizers, kind: str) -> None:
    for operand, quantizer in pair._asdict().items():
        enable = (kind, operand) in _FUNCTIONS
        arguments = {"format": kind, "operand": operand}
        quantizer.set_from_attribute_config({**_ATTRIBUTES[kind], "backend_extra_args": arguments, "enable": enable})


def _function(quantizer: TensorQuantizer) -> Callable[[Tensor, Tensor], Tensor]:
    arguments = quantizer.backend_extra_args
    return _FUNCTIONS[arguments["format"], arguments["operand"]]


def _range_shape(pair: Quantizers) -> tuple[int, ...]:
    experts = pair.weight.__dict__.get("_qat_experts")
    return () if experts is None else (int(experts),)


def _range(quantizer: TensorQuantizer) -> Tensor:
    amax: Tensor = quantizer._amax
    return amax.detach().to("cpu", torch.float32).clone()


def _set_amax(quantizer: TensorQuantizer, amax: Tensor) -> None:
    """Replace the range by a float32 buffer on its own storage (ModelOpt's setter keeps the calibrator's dtype).

    The buffer is not persistent: PEFT would write it into every adapter file. Ranges are saved as `QuantState`.
    """
    device = quantizer._amax.device if hasattr(quantizer, "_amax") else None
    quantizer.reset_amax()
    quantizer.register_buffer("_amax", amax.detach().to(device, torch.float32).clone(), persistent=False)
