"""The base checkpoint: where it lies, whether it is what the recipe says, and how it is loaded.

Nothing here reaches for a network: a hub id is looked up in the local cache of Hugging Face only.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.errors import UserError
from qat.receipt import sha256_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qat.recipe.schema import BaseBlock

TINY_BASE = "tiny-base"
"""Recipe name of the embedded checkpoint."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HASHED_TOGETHER = 4
_REMEMBERED_FROM = 1 << 26
_SETTLED_NS = 5_000_000_000
_hashed: dict[tuple[int, ...], str] = {}

_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")

# Without the first two the loaded network is not the one that the checkpoint holds and vLLM serves; with the third a
# GPU uses mamba-ssm's kernels where that package was built without its CUDA extension.
PATCHES = {
    "nemotron_h": ("nemotron_h_special_dtypes", "nemotron_h_time_step_limit", "mamba_ssm_kernels_without_build"),
}

_MODEL_TYPES = {
    "nemotron_h": ("nemotron_h",),
    "qwen": ("qwen2", "qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_next"),
    "llama": ("llama", "mistral"),
}


def resolve_base(block: BaseBlock) -> Path:
    """Find the folder of the base checkpoint.

    Args:
        block: `model` is `tiny-base`, a folder, or a hub id.

    Returns:
        A folder with `config.json` and safetensors weights of the recipe's family.

    Raises:
        UserError: There is no such folder, the hub id is not in the local cache, the folder is no complete checkpoint,
            or it holds a quantized model or one of another family.
    """
    if block.model == TINY_BASE:
        folder = Path(__file__).resolve().parents[1] / "data" / "tiny_base"
    elif Path(block.model).is_dir():
        folder = Path(block.model)
    elif _HUB_ID.fullmatch(block.model) and not block.model.startswith((".", "/")):
        folder = _cached_snapshot(block.model, block.revision)
    else:
        raise UserError(
            "The base checkpoint does not exist.",
            where="base.model",
            value=block.model,
            remedy=f"name {TINY_BASE!r}, a folder with config.json and safetensors, or a hub id in the local cache",
        )
    require_suitable(folder, block)
    weight_files(folder)
    return folder


def require_suitable(folder: Path, block: BaseBlock) -> None:
    """Check a base by its configuration alone, which is there before any weight is.

    Args:
        folder: With `config.json`.
        block: Says the family that it must be of.

    Raises:
        UserError: There is no readable configuration, it is of another family, or the weights are quantized.
    """
    config = _read_config(folder)
    if config.get("model_type") not in _MODEL_TYPES[block.family]:
        raise UserError(
            f"The base checkpoint is no {block.family} model.",
            where=str(folder / "config.json"),
            value=f"model_type: {config.get('model_type')!r}",
            remedy=f"base.family {block.family} takes {', '.join(_MODEL_TYPES[block.family])}",
        )
    if config.get("quantization_config") is not None or (folder / "hf_quant_config.json").exists():
        raise UserError(
            "The base checkpoint is quantized already: training starts from BF16 weights.",
            where=str(folder),
            value=_quantization(config),
            remedy="name the BF16 checkpoint that it was made from; `train.memory: nvfp4` packs it while loading",
        )


def _quantization(config: dict[str, Any]) -> str | None:
    """What a quantized checkpoint says of itself."""
    own = config.get("quantization_config")
    if not isinstance(own, dict):
        return None
    return ", ".join(str(own[key]) for key in ("quant_method", "quant_algo", "format") if own.get(key)) or None


def _cached_snapshot(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"The base checkpoint is neither a folder here nor in the local Hugging Face cache{at}.",
            where="base.model",
            value=hub_id,
            remedy="`qat fetch` brings it where there is a network; without one name its folder",
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            "The base checkpoint has no config.json.", where=str(folder), remedy="name the checkpoint's folder"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError("The base checkpoint's config.json is no JSON.", where=str(path), value=str(error)) from error
    if not isinstance(config, dict):
        raise UserError("The base checkpoint's config.json is no JSON object.", where=str(path))
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by name.

    Args:
        folder: The checkpoint.

    Raises:
        UserError: There are none, one that the index names is missing, or the index is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = _indexed(index)
        missing = [name for name in named if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(named)} weight files are missing.",
                where=str(folder),
                value=", ".join(missing[:3]),
                remedy="download the checkpoint again",
            )
        return [folder / name for name in named]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            "The base checkpoint has no safetensors weights.",
            where=str(folder),
            remedy="only safetensors are read, never pickles",
        )
    shards = [file.name for file in files if _SHARD.fullmatch(file.name)]
    if shards:
        raise UserError(
            "The base checkpoint lies in several weight files, and their index is missing.",
            where=str(index),
            value=f"{len(shards)} files, first {shards[0]}",
            remedy="download the checkpoint again: without the index nobody can tell whether all files are there",
        )
    return files


def _indexed(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "The index of the weight files is damaged.",
            where=str(index),
            value=f"{type(error).__name__}: {error}",
            remedy="download the checkpoint again",
        ) from error


def base_sha256(folder: Path) -> str:
    """What adapters and quantizer states remember of their base: SHA-256 of its weights.

    Args:
        folder: The checkpoint.

    Returns:
        SHA-256, in hexadecimal, of one line for each safetensors file, sorted by name: file name, zero byte, SHA-256 of
        the file in hexadecimal, line feed. Configuration and tokenizer do not enter it: they may be mended without
        touching what was trained.
    """
    files = weight_files(folder)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_HASHED_TOGETHER) as pool:
        for file, own in zip(files, pool.map(_file_sha256, files), strict=True):
            digest.update(f"{file.name}\0{own}\n".encode())
    return digest.hexdigest()


def _file_sha256(file: Path) -> str:
    """SHA-256 of a weight file, once a process: every stage asks for the base's, and 63 GB take most of a minute.

    It is the same file as long as its place on the disk, size and times are. Of one that was touched a moment ago the
    times may not tell the next change, and a small one costs nothing.
    """
    stat = file.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _hashed:
        settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS
        own = sha256_file(file)
        if not settled or stat.st_size < _REMEMBERED_FROM:
            return own
        _hashed[key] = own
    return _hashed[key]


def training_device() -> torch.device:
    """This process's CUDA device (the first, where it was not given one), or the CPU where there is none."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_base(folder: Path) -> PreTrainedModel:
    """Load the base in BF16, frozen, on the training device.

    Args:
        folder: The checkpoint.

    Returns:
        The causal language model in `eval` mode, without KV cache. Weights are bfloat16; tensors that the architecture
        keeps in float32 (the router's score correction) stay so.

    Raises:
        UserError: A weight file is damaged, or the checkpoint does not hold all weights of its architecture.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from qat.patches.registry import ensure

    ensure(*PATCHES.get(str(_read_config(folder).get("model_type")), ()))
    device = training_device()
    verbosity = logging.get_verbosity()
    # Its notes on missing GPU kernels say nothing new on a CPU, and its bar would stand among ours.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            local_files_only=True,
            experts_implementation="eager",
            output_loading_info=True,
            # Of other shapes they are listed in the loading info, and refused below with their names.
            ignore_mismatched_sizes=True,
        )
    except SafetensorError as error:
        raise UserError(
            "A weight file of the base checkpoint is damaged.",
            where=str(folder),
            value=str(error),
            remedy="download it again",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    faults = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info[kind]}
    if faults:
        raise UserError(
            "The base checkpoint does not fit its own config.json.",
            where=str(folder),
            value="; ".join(f"{kind}: {len(names)}, first {names[0]}" for kind, names in faults.items()),
            remedy="random weights would stand in for them: name a complete checkpoint",
        )
    # Measured on 2 CPU cores, 4 M parameters, 8 x 256 tokens: the loop over experts is 10-15 % faster than grouped_mm.
    if device.type == "cuda":
        group_experts_(model)
    model.config.use_cache = False
    model.requires_grad_(False)
    use_kernels_(model.to(device).eval())
    return model


def group_experts_(model: PreTrainedModel) -> None:
    """Let fused experts multiply all at once instead of one after the other; a dense model is left alone."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")


def use_kernels_(model: PreTrainedModel) -> None:
    """On a GPU, let Nemotron-H's normalizations and mixers compute with this package's kernels."""
    if training_device().type == "cuda":
        from qat.quant.kernels.nemotron_h import use_fast_layers_

        use_fast_layers_(model)


def load_tokenizer(block: BaseBlock, folder: Path) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, with the recipe's chat template where it names one.

    Args:
        block: `chat_template` may name a Jinja file.
        folder: The checkpoint.

    Raises:
        UserError: There is no tokenizer, or the template file is missing.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            "The base checkpoint's tokenizer cannot be loaded.", where=str(folder), value=str(error)
        ) from error
    if block.chat_template is not None:
        template = Path(block.chat_template)
        if not template.is_file():
            raise UserError("The chat template does not exist.", where="base.chat_template", value=block.chat_template)
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer
