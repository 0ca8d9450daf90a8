"""`quant_state.safetensors`: what training hands to export.

One float32 tensor `<module>.weight_amax` (scalar; (experts,) for fused experts) and, where activations are quantized,
one scalar `<module>.input_amax` per quantized module, under the checkpoint's module names; everything else is metadata
(strings holding JSON). Layout: docs/architecture.md, section 8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from qat import __version__
from qat.errors import UserError
from qat.quant.presets import FORMATS, NVFP4, PRESETS, W4A16, Preset
from qat.storage import write_atomic

FORMAT_VERSION = 2
"""Raised when a reader of the old layout would misread the new one. Version 2 knows formats other than NVFP4; a state
without any is written as version 1, which every release reads."""

_WEIGHT, _INPUT = ".weight_amax", ".input_amax"
_REMEDY = "Write it again: run the calibration or the distillation of this run once more."
_KINDS: dict[str, type] = {"preset": str, "kv_cache": str, "groups": list, "excluded": list, "base_sha256": str}


class ModuleState(NamedTuple):
    """The calibrated ranges of one module.

    Attributes:
        weight_amax: float32 (), or (experts,) for fused experts; NVFP4's scale is amax / (6 * 448), FP8's amax / 448.
        input_amax: float32 (); one for all experts of a layer. None where activations are left alone (`w4a16`).
        format: One of `qat.quant.presets.FORMATS`.
    """

    weight_amax: Tensor
    input_amax: Tensor | None
    format: str = NVFP4


@dataclass
class QuantState:
    """The state of all quantizers of a model.

    Attributes:
        modules: Ranges by the checkpoint's module name.
        preset: Name of the precision preset.
        kv_cache: `bf16` or `fp8`.
        groups: Modules that share their ranges.
        excluded: Modules left in BF16.
        base_sha256: Digest of the base checkpoint that the adapter stands on.
        adapter: Folder of the adapter that belongs to this state, relative to the file; None where there is none.
        qat_version: The version that wrote the file.
    """

    modules: dict[str, ModuleState]
    preset: str
    kv_cache: str
    groups: list[list[str]]
    excluded: list[str]
    base_sha256: str
    adapter: str | None = None
    qat_version: str = field(default=__version__)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all; the same state always gives the same bytes.

        Args:
            path: Where to; its folder exists.

        Raises:
            UserError: The disk is full or the folder cannot be written.
            ValueError: An amax is not positive and finite, or has a shape that the format does not know.
        """
        tensors = {}
        for name in sorted(self.modules):
            module = self.modules[name]
            if not _is_valid(module):
                raise ValueError(f"{name} has no valid ranges: {module}")
            if module.input_amax is not None:
                tensors[name + _INPUT] = module.input_amax
            tensors[name + _WEIGHT] = module.weight_amax
        formats = {name: module.format for name, module in sorted(self.modules.items()) if module.format != NVFP4}
        metadata = {
            "format_version": FORMAT_VERSION if formats else 1,
            "preset": self.preset,
            "kv_cache": self.kv_cache,
            "groups": self.groups,
            "excluded": self.excluded,
            "adapter": self.adapter,
            "base_sha256": self.base_sha256,
            "qat_version": self.qat_version,
            **({"formats": formats} if formats else {}),
        }
        write_atomic(path, _serialize(tensors, metadata))

    @classmethod
    def load(cls, path: Path) -> QuantState:
        """Read the file and check it.

        Args:
            path: The file.

        Returns:
            The state.

        Raises:
            UserError: The file is missing, truncated, of another format version, or not a quantizer state.
        """
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise UserError("There is no quantizer state.", where=str(path), remedy=_REMEDY) from None
        try:
            tensors = load(content)
            metadata = _metadata(content)
        except (SafetensorError, ValueError) as error:
            raise UserError(
                "The quantizer state is damaged or truncated.", where=str(path), value=str(error), remedy=_REMEDY
            ) from error
        version = metadata.get("format_version")
        if version not in (1, FORMAT_VERSION):
            raise UserError(
                f"The quantizer state has another format version than 1 to {FORMAT_VERSION}.",
                where=str(path),
                value=version,
                remedy="Use the version of qat that wrote it (metadata qat_version), or write it again.",
            )
        for key, kind in _KINDS.items():
            if not isinstance(metadata.get(key), kind):
                raise _fault(path, f"its metadata has no {key}", metadata.get(key))
        return cls(
            modules=_modules(tensors, metadata.get("formats", {}), path),
            adapter=metadata.get("adapter"),
            qat_version=str(metadata.get("qat_version")),
            **{key: metadata[key] for key in _KINDS},
        )

    def precision(self) -> Preset:
        """The preset of this state; an own one is rebuilt from what the modules are."""
        if self.preset in PRESETS:
            return Preset(self.preset)
        return Preset(self.preset, {name: module.format for name, module in self.modules.items()})

    def require_base(self, sha256: str, where: str) -> None:
        """Check that the state belongs to a base.

        Args:
            sha256: Digest of the base at hand, computed as training computes it.
            where: The base, for the message.

        Raises:
            UserError: The state was made on another base.
        """
        if sha256 != self.base_sha256:
            raise UserError(
                "The quantizer state belongs to another base checkpoint.",
                where=where,
                value=f"base {sha256[:16]}…, quantizer state made on {self.base_sha256[:16]}…",
                remedy="Give the base that was trained on.",
            )


def _serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Lay the safetensors file out by hand: the library writes metadata entries in a random order."""
    header: dict[str, Any] = {
        "__metadata__": {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}
    }
    body = bytearray()
    for name, tensor in tensors.items():
        raw = tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(body)


def _metadata(content: bytes) -> dict[str, Any]:
    """Read the metadata of a file whose layout safetensors has already checked."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {key: json.loads(value) for key, value in header.get("__metadata__", {}).items()}


def _modules(tensors: Mapping[str, Tensor], formats: object, path: Path) -> dict[str, ModuleState]:
    names = sorted(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
    if not names:
        raise _fault(path, "it holds no module", None)
    unknown = [key for key in tensors if not key.endswith((_WEIGHT, _INPUT))]
    if unknown:
        raise _fault(path, "it holds a tensor that is no range", unknown[0])
    known = (
        isinstance(formats, dict) and set(formats) <= set(names) and all(kind in FORMATS for kind in formats.values())
    )
    if not isinstance(formats, dict) or not known:
        raise _fault(path, "its formats are none of modules that it holds", formats)
    modules = {}
    for name in names:
        kind = formats.get(name, NVFP4)
        weight, entry = tensors.get(name + _WEIGHT), tensors.get(name + _INPUT)
        if weight is None or (entry is None) != (kind == W4A16):
            raise _fault(path, f"a module lacks one of its ranges, or has one too many for {kind}", name)
        modules[name] = ModuleState(weight, entry, kind)
        if not _is_valid(modules[name]):
            raise _fault(path, "a module's ranges are not positive finite float32 numbers", name)
    return modules


def _is_valid(module: ModuleState) -> bool:
    weight, entry = module.weight_amax, module.input_amax
    if (entry is None) != (module.format == W4A16) or (entry is not None and (entry.dim() or not _is_range(entry))):
        return False
    return weight.dim() <= 1 and _is_range(weight)


def _is_range(amax: Tensor) -> bool:
    return amax.dtype == torch.float32 and amax.numel() > 0 and bool((torch.isfinite(amax) & (amax > 0)).all())


def _fault(path: Path, problem: str, value: object) -> UserError:
    return UserError(f"This is no usable quantizer state: {problem}.", where=str(path), value=value, remedy=_REMEDY)
