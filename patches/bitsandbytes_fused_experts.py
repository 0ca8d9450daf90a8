"""bitsandbytes quantizes linears, and fused experts are none."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qat.patches.peft_fused_experts_missed import EXPERTS
from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.tiny import nemotron_h_config


class BitsandbytesFusedExperts:
    """Nothing to patch: Transformers replaces `nn.Linear` modules, and the experts are two parameters of a module."""

    name = "bitsandbytes_fused_experts"
    title = "load_in_4bit leaves fused experts in BF16"
    breaks = (
        "Silent: 29.4 of the 30B model's 31.6 G parameters stay in 16 bits, so 4-bit loading saves next to no memory; "
        "prepare_model_for_kbit_training then doubles them (peft_kbit_experts_upcast)."
    )
    upstream = "transformers/integrations/bitsandbytes.py: replace_with_bnb_linear"
    affects = "bitsandbytes 0.50.2 with transformers >=5.0"
    libraries = ("bitsandbytes", "transformers")
    place = Place.HERE
    repair = (
        "qat refuses `train.memory: nf4` for this reason. It trains factors on the BF16 base, or packs the base, "
        "experts included, into NVFP4 (`train.memory: nvfp4`). Elsewhere plan for BF16 experts, or use remote code "
        "whose experts are linears."
    )

    def probe(self) -> ProbeResult:
        """Replace the linears of a tiny model as loading does, and look at the experts."""
        try:
            importlib.import_module("bitsandbytes")
        except ImportError as error:
            return ProbeResult(Status.CANNOT_TELL, f"bitsandbytes cannot be imported: {error}")
        from transformers import BitsAndBytesConfig
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        with _tiny() as model:
            replaced = replace_with_bnb_linear(model, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
        sizes = _bytes_a_number(replaced)
        if any(size > 1 for size in sizes.values()):
            text = ", ".join(f"{name} {size}" for name, size in sizes.items())
            return ProbeResult(Status.NEEDED, f"bytes a number after loading in 4 bits: {text}")
        return ProbeResult(Status.NOT_NEEDED, "the fused experts were quantized")

    def verify(self) -> ProbeResult:
        """Train factors on the BF16 base, as qat does: two bytes a number, as its plan counts, and none is upcast."""
        import torch
        from peft import LoraConfig, get_peft_model

        tokens = torch.arange(16).view(1, 16)
        with _tiny() as model:
            adapter = LoraConfig(r=2, target_modules=[], target_parameters=list(EXPERTS))
            adapted = get_peft_model(model, adapter)
            adapted(input_ids=tokens, labels=tokens).loss.backward()
        sizes = _bytes_a_number(adapted)
        status = Status.NOT_NEEDED if set(sizes.values()) == {2} else Status.NEEDED
        return ProbeResult(status, f"bytes a number in training: {', '.join(map(str, sizes.values()))}")


@contextmanager
def _tiny() -> Iterator[Any]:
    """A model in BF16 with one layer of experts, and no trace in the random numbers."""
    import torch
    from transformers import NemotronHForCausalLM

    with torch.random.fork_rng(devices=[]):
        yield NemotronHForCausalLM(nemotron_h_config("moe", use_cache=False)).bfloat16()


def _bytes_a_number(model: Any) -> dict[str, int]:
    """Of the routed experts' own parameters."""
    return {
        name: parameter.element_size()
        for name, parameter in model.named_parameters()
        if ".experts." in name and "lora_" not in name
    }


register(BitsandbytesFusedExperts())
