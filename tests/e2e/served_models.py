"""Checkpoints for the tests that start a real vLLM: a random tiny Nemotron-H, in BF16 and exported to NVFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from qat.export import export_checkpoint
from tests import tiny_models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _model() -> PreTrainedModel:
    """`nemotron_h_tiny` with heads of 32: vLLM's attention for CPU has no kernel for 16."""
    from transformers import AutoModelForCausalLM

    config = tiny_models.nemotron_h_tiny().config
    config.head_dim, config.num_attention_heads, config.num_key_value_heads = 32, 4, 2
    config.dtype = torch.bfloat16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "conv1d" not in name:
                parameter.normal_(std=0.8 / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model.eval()


def save_base(folder: Path) -> Path:
    """Write the BF16 checkpoint with a byte-level tokenizer of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<|im_start|>", "<|im_end|>", *alphabet])}
    fast = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tiny_models.save_tiny(folder, _model())
    tokenizer.save_pretrained(folder)
    return folder


def export_nvfp4(base: Path, out: Path, kv_cache: str = "bf16", preset: str = "all") -> Path:
    """Calibrate on random tokens and export; `<out>.originals.safetensors` gets the weights as they were."""
    from transformers import AutoModelForCausalLM

    from qat.quant import modelopt
    from qat.quant.names import memory_name
    from qat.train.base import base_sha256

    config = json.loads((base / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    inserted = modelopt.insert_quantizers(model, preset, config)
    modelopt.calibrate(model, lambda network: network(tiny_models.token_ids(4, 64)))
    state = modelopt.collect_state(model, inserted, kv_cache=kv_cache, base_sha256=base_sha256(base))
    state_file = out.with_suffix(".quant_state.safetensors")
    state.save(state_file)
    export_checkpoint(base, out, quant_state=state_file)

    originals = {}
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for name, ranges in state.modules.items():
        path = memory_name(name, config["model_type"])
        weight = plain.get_parameter(path if ".mixer.experts." in name else f"{path}.weight")
        originals[f"{name}.weight"] = weight.detach().contiguous()
        originals[f"{name}.weight_amax"] = ranges.weight_amax
        if ranges.input_amax is not None:
            originals[f"{name}.input_amax"] = ranges.input_amax
    save_file(originals, out.with_suffix(".originals.safetensors"))
    return out
