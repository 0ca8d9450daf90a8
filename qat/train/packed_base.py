"""Loading a base into NVFP4, one tensor after the other: the BF16 model never stands in memory as a whole.

Transformers' loader fills the whole BF16 network before anything can be packed. Here the network is built without
memory (`meta`), and every tensor goes from its file to the training device, is packed there if the recipe packs its
module, and is put in place; of routed experts one expert at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.errors import UserError
from qat.patches.registry import ensure
from qat.progress import progress_bar
from qat.quant.names import expert_tensors, is_fused_experts, memory_name
from qat.quant.nvfp4 import Packed
from qat.quant.packed import PackedWeight, pack
from qat.train.base import PATCHES, group_experts_, training_device, use_kernels_, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Stored wider than BF16 they are used so: the decay is exp(A_log) (see the patch nemotron_h_special_dtypes).
_KEPT_AS_STORED = re.compile(r".*\.mixer\.(A_log|D|dt_bias)")
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.\d+\.(?P<projection>gate_proj|up_proj|down_proj)\.weight")


class _Files:
    """The tensors of a checkpoint by name, read one at a time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self._files: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise UserError(
                    "A weight file of the base checkpoint is damaged.",
                    where=str(path),
                    value=str(error),
                    remedy="download it again",
                ) from error
            self._files |= dict.fromkeys(file.keys(), file)

    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> Tensor:
        if name not in self._files:
            raise _unfit(self.folder, f"missing: {name}")
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def load_packed_base(folder: Path, modules: Sequence[str]) -> PreTrainedModel:
    """Load the base with some modules in NVFP4, frozen, on the training device.

    Args:
        folder: The checkpoint.
        modules: Checkpoint names of the linears and fused experts to pack (`qat.quant.packed.packed_modules`).

    Returns:
        The causal language model in `eval` mode, without KV cache; as `load_base` gives it, but that the weights of
        `modules` are `PackedWeight` parameters.

    Raises:
        UserError: A file is damaged, a tensor is missing or does not fit, or the model type's names are not known.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_type = str(config.get("model_type"))
    memory_name("", model_type)
    ensure(*PATCHES.get(model_type, ()), *(("nemotron_h_fused_mamba",) if model_type == "nemotron_h" else ()))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, local_files_only=True),
            dtype=torch.bfloat16,
            experts_implementation="eager",
        )
    # On every device: a loop over experts would unpack all of them for each.
    group_experts_(model)
    with ExitStack() as stack:
        _fill(model, _Files(folder, stack), {memory_name(name, model_type) for name in modules}, model_type)
    _compute_buffers(model)
    model.tie_weights()
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise _unfit(folder, f"missing: {len(left)}, first {left[0]}")
    model.config.use_cache = False
    model.requires_grad_(False)
    use_kernels_(model)
    return model.eval()


def _fill(model: PreTrainedModel, files: _Files, packed: set[str], model_type: str) -> None:
    """Give every tensor of the checkpoint its place; `packed` are names in memory."""
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    wide = tuple(model._keep_in_fp32_modules_strict or ())
    work = list(_places(files, model_type))
    found = {place for place, _ in work}
    missing = [name for name in packed if not {name, f"{name}.weight"} & found]
    if missing:
        raise UserError(
            "A module to pack is not in the checkpoint.", where=str(files.folder), value=", ".join(missing[:3])
        )
    with progress_bar("packing the base", len(work)) as bar:
        for done, (place, parts) in enumerate(work):
            if place in places:
                is_packed = place.removesuffix(".weight") in packed
                value = _value(place, parts, files, places[place], is_packed, wide)
                _put(model, place, value)
            bar.update(done + 1)


def _places(files: _Files, model_type: str) -> Iterator[tuple[str, list[str]]]:
    """Each tensor in memory and the tensors of the checkpoint that make it up, in the order of its rows."""
    experts: dict[str, int] = {}
    names = set(files.names())
    for name in files.names():
        match = _EXPERT.fullmatch(name)
        if match is None:
            yield memory_name(name, model_type), [name]
            continue
        gated = match["projection"] != "down_proj" and f"{match['experts']}.0.gate_proj.weight" in names
        fused = f"{match['experts']}.{'gate_up_proj' if gated else match['projection']}"
        experts[fused] = experts.get(fused, 0) + 1
    for fused, count in experts.items():
        number = count // 2 if fused.endswith("gate_up_proj") else count
        yield memory_name(fused, model_type), [part.name for part in expert_tensors(fused, number)]


def _value(place: str, parts: list[str], files: _Files, like: Tensor, is_packed: bool, wide: tuple[str, ...]) -> Tensor:
    device = training_device()
    if not is_fused_experts(place):
        tensor = files.read(parts[0])
        dtype = torch.float32 if any(key in place for key in wide) else torch.bfloat16
        if _KEPT_AS_STORED.fullmatch(place) and tensor.dtype.itemsize > dtype.itemsize:
            dtype = tensor.dtype
        tensor = tensor.to(device, dtype)
        _require_shape(place, tensor.shape, like, files.folder)
        return PackedWeight(pack(tensor), dtype) if is_packed else tensor
    each = max(1, len(parts) // like.shape[0])  # gate and up are two parts of one expert's matrix
    matrices = (
        torch.cat([files.read(part).to(device, torch.bfloat16) for part in parts[start : start + each]])
        for start in range(0, len(parts), each)
    )
    if not is_packed:
        whole = torch.stack(list(matrices))
        _require_shape(place, whole.shape, like, files.folder)
        return whole
    columns = zip(*(pack(matrix) for matrix in matrices), strict=True)
    value = PackedWeight(Packed(*(torch.stack(column) for column in columns)), torch.bfloat16)
    _require_shape(place, value.shape, like, files.folder)
    return value


def _require_shape(place: str, shape: torch.Size, like: Tensor, folder: Path) -> None:
    if shape != like.shape:
        raise _unfit(folder, f"{place}: {tuple(shape)}, not {tuple(like.shape)}")


def _unfit(folder: Path, value: str) -> UserError:
    return UserError(
        "The base checkpoint does not fit its own config.json.",
        where=str(folder),
        value=value,
        remedy="random weights would stand in for what is missing: name a complete checkpoint",
    )


def _put(model: PreTrainedModel, place: str, value: Tensor) -> None:
    parent, _, leaf = place.rpartition(".")
    holder = model.get_submodule(parent)
    if leaf in holder._parameters:
        holder._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    else:
        holder._buffers[leaf] = value


def _compute_buffers(model: PreTrainedModel) -> None:
    """Fill the buffers that no checkpoint holds (rotary frequencies) as the model's own initialization does."""
    device = training_device()
    for module in model.modules():
        own = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if any(module._buffers[name].is_meta for name in own):
            for name in own:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
            with torch.no_grad():
                model._init_weights(module)
