"""What a checkpoint says about its quantization, and what its tensors are.

The claims stand in two files: `quantization_config` in `config.json`, which vLLM reads, and `hf_quant_config.json`,
which ModelOpt writes, other servers read, and vLLM reads where the first is absent (`transformers_utils/config.py`).
The facts are the tensors: a packed NVFP4 weight is uint8 with a `weight_scale` beside it, an FP8 weight is float8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qat.export.doctor.config_fields import CONFIG, flattened
from qat.export.doctor.folder import CheckpointView
from qat.export.doctor.header import TensorInfo

QUANT_CONFIG = "hf_quant_config.json"

#: ModelOpt's algorithms that vLLM 0.32 serves (`modelopt.py`, `QUANT_ALGOS`), and what their weights are stored as.
ALGORITHMS = {
    "FP8": "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN": "FP8",
    "FP8_PB_WO": "FP8",
    "NVFP4": "NVFP4",
    "W4A16_NVFP4": "NVFP4",
    "MXFP8": "FP8",
}
MIXED = "MIXED_PRECISION"

#: The last part of a module's name -> what it is for.
_KINDS = {
    "embedding": ("embed_tokens", "embeddings", "wte"),
    "router": ("gate", "router", "shared_expert_gate"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
    "mamba": ("in_proj", "out_proj"),
    "convolution": ("conv1d",),
    "latent": ("fc1_latent_proj", "fc2_latent_proj"),
}

SCALES = ("weight_scale", "weight_scale_2", "input_scale")


class Claim(NamedTuple):
    """What one file says about the quantization.

    Attributes:
        place: File and key.
        algorithm: `quant_algo` in capitals; empty where there is none.
        group_size: Weights that share a scale; None where the file does not say.
        kv_cache: `FP8`, `NVFP4` or another format of the KV cache; empty for none.
        excluded: Names and patterns of modules that stay unquantized.
        layers: Algorithm of each module, where precisions are mixed.
        content: The object that holds these fields.
        document: What it stands in, with the producer: the whole of `hf_quant_config.json`, else `content`.
    """

    place: str
    algorithm: str
    group_size: int | None
    kv_cache: str
    excluded: tuple[str, ...]
    layers: dict[str, str]
    content: Mapping[str, Any]
    document: Mapping[str, Any]


class WeightModule(NamedTuple):
    """A weight of two or more dimensions with the scales beside it.

    Attributes:
        name: The module's name in the checkpoint.
        precision: `NVFP4`, `FP8`, or safetensors' name of the dtype.
        weight: The weight.
        scales: Its scales, by the last part of their names.
    """

    name: str
    precision: str
    weight: TensorInfo
    scales: dict[str, TensorInfo]

    @property
    def is_quantized(self) -> bool:
        """Whether a server needs scales to read the weight."""
        return self.precision in ("NVFP4", "FP8")

    @property
    def parameters(self) -> int:
        """Weights that it holds: two in each byte of a packed one."""
        return self.weight.elements * (2 if self.precision == "NVFP4" else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its scales."""
        return self.weight.nbytes + sum(scale.nbytes for scale in self.scales.values())


def claims(view: CheckpointView) -> list[Claim]:
    """Read what the checkpoint says about a quantization by ModelOpt, the file that vLLM goes by first."""
    found: list[Claim] = []
    block = flattened(view.config or {}).get("quantization_config")
    if isinstance(block, dict) and _is_modelopt(block):
        found.append(_claim(f"{CONFIG}: quantization_config", block))
    if view.hf_quant_config is not None:
        found.append(_claim(QUANT_CONFIG, view.hf_quant_config))
    if len(found) == 2 and not found[0].layers:  # vLLM then takes the list of the second file
        found[0] = found[0]._replace(layers=found[1].layers)
    return found


def foreign_method(view: CheckpointView) -> str:
    """Name the method of a quantization that is none of ModelOpt's; empty where there is none."""
    block = flattened(view.config or {}).get("quantization_config")
    return "" if not isinstance(block, dict) or _is_modelopt(block) else str(block.get("quant_method"))


def weight_modules(view: CheckpointView) -> dict[str, WeightModule]:
    """Find the weights of two or more dimensions and what they are stored as."""
    modules: dict[str, WeightModule] = {}
    for name, weight in view.tensors.items():
        if name.endswith(".weight") and len(weight.shape) > 1:
            module = name.removesuffix(".weight")
            scales = {leaf: view.tensors[full] for leaf in SCALES if (full := f"{module}.{leaf}") in view.tensors}
            modules[module] = WeightModule(module, _precision(weight, scales), weight, scales)
    return modules


def module_kind(name: str) -> str:
    """Say what a module is for, in the words of the census."""
    parts = name.split(".")
    leaf = parts[-1]
    if any(part.startswith("shared_expert") for part in parts[:-1]):
        return "shared experts"
    if "experts" in parts[:-1]:
        return "routed experts"
    if leaf in ("lm_head", "output"):
        return "output"
    for kind, leaves in _KINDS.items():
        if leaf in leaves:
            return kind
    return "other"


class CensusRow(NamedTuple):
    """How much of a checkpoint one kind of module in one precision takes.

    Attributes:
        kind: `attention`, `routed experts`, …; `vectors` for everything of one dimension or none.
        precision: `NVFP4`, `FP8`, or safetensors' name of the dtype.
        modules: Number of weights, or of vectors.
        parameters: Number of values that they stand for; scales count as none.
        bytes: Size on disk, scales included.
    """

    kind: str
    precision: str
    modules: int
    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for one weight, its share of the scales included; NVFP4 takes 4.5."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


def census(view: CheckpointView) -> list[CensusRow]:
    """Count a checkpoint's weights by kind of module and stored precision, the largest share first.

    Every byte of every tensor is counted once.
    """
    counted: dict[tuple[str, str], list[int]] = {}
    inside: set[str] = set()
    for module in weight_modules(view).values():
        inside |= {module.weight.name, *(scale.name for scale in module.scales.values())}
        _add(counted, module_kind(module.name), module.precision, module.parameters, module.nbytes)
    for tensor in view.tensors.values():
        if tensor.name not in inside:
            kind = "other" if len(tensor.shape) > 1 else "vectors"
            _add(counted, kind, tensor.dtype, tensor.elements, tensor.nbytes)
    rows = [CensusRow(kind, precision, *totals) for (kind, precision), totals in counted.items()]
    return sorted(rows, key=lambda row: (-row.bytes, row.kind, row.precision))


def _add(counted: dict[tuple[str, str], list[int]], kind: str, precision: str, parameters: int, nbytes: int) -> None:
    totals = counted.setdefault((kind, precision), [0, 0, 0])
    for position, amount in enumerate((1, parameters, nbytes)):
        totals[position] += amount


def _is_modelopt(block: Mapping[str, Any]) -> bool:
    producer = block.get("producer")
    named = producer.get("name") if isinstance(producer, dict) else None
    return str(block.get("quant_method", "")).startswith("modelopt") or named == "modelopt" or "quant_algo" in block


def _claim(place: str, document: Mapping[str, Any]) -> Claim:
    inner = document.get("quantization")
    content = inner if isinstance(inner, dict) else document
    excluded = content.get("exclude_modules", content.get("ignore"))
    layers = content.get("quantized_layers")
    return Claim(
        place=place,
        algorithm=str(content.get("quant_algo") or "").upper(),
        group_size=next((size for size in _group_sizes(content) if type(size) is int), None),
        kv_cache=_kv_cache(content),
        excluded=tuple(name for name in excluded if isinstance(name, str)) if isinstance(excluded, list) else (),
        layers={
            name: str(entry.get("quant_algo") or "").upper()
            for name, entry in (layers if isinstance(layers, dict) else {}).items()
            if isinstance(entry, dict)
        },
        content=content,
        document=document,
    )


def _group_sizes(content: Mapping[str, Any]) -> Iterator[object]:
    yield content.get("group_size")
    groups = content.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights.get("group_size")


def _kv_cache(content: Mapping[str, Any]) -> str:
    found = content.get("kv_cache_scheme") or content.get("kv_cache_quant_algo")
    if isinstance(found, dict):
        known = {("float", 8): "FP8", ("float", 4): "NVFP4"}
        return known.get((found.get("type"), found.get("num_bits")), str(found))  # type: ignore[arg-type]
    return str(found).upper() if found else ""


def _precision(weight: TensorInfo, scales: Mapping[str, TensorInfo]) -> str:
    if weight.dtype == "U8" and ("weight_scale" in scales or "weight_scale_2" in scales):
        return "NVFP4"
    return "FP8" if weight.dtype == "F8_E4M3" else weight.dtype
