"""PEFT's `target_modules` cannot name fused experts, and does not say that it missed them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qat.patches.guard import DeadModules, Seen, watch
from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.tiny import nemotron_h_config

EXPERTS = ("mixer.experts.up_proj", "mixer.experts.down_proj")
"""What `target_parameters` takes for the fused experts of Nemotron-H."""


class PeftFusedExpertsMissed:
    """Nothing to patch: the experts are parameters, and PEFT has another argument for those."""

    name = "peft_fused_experts_missed"
    title = "PEFT's target_modules misses fused experts"
    breaks = (
        "Silent: up_proj and down_proj match the shared expert only; on the 30B model 27 M instead of 888 M parameters "
        "are trained, and the loss falls all the same."
    )
    upstream = "peft/tuners/tuners_utils.py: check_target_module_exists; unslothai/unsloth#4476"
    affects = "peft with transformers >=5.0, whose experts are 3-D parameters; 0.21.2 seen"
    libraries = ("peft", "transformers")
    place = Place.HERE
    repair = (
        "qat names experts by target_parameters, compares what PEFT adapted with what the recipe asked for, and the "
        "guard looks for gradients. Elsewhere pass target_parameters=['mixer.experts.up_proj', "
        "'mixer.experts.down_proj'] and count the trainable parameters."
    )

    def probe(self) -> ProbeResult:
        """Ask for up_proj and down_proj by name and train one step."""
        seen = train_a_step(target_modules=["up_proj", "down_proj"])
        missed = [name for name in seen.dead.without_adapter if ".experts." in name]
        if missed:
            return ProbeResult(Status.NEEDED, f"no adapter on {', '.join(missed)}, and no message")
        return ProbeResult(Status.NOT_NEEDED, "up_proj and down_proj reach the fused experts")

    def verify(self) -> ProbeResult:
        """Ask for the parameters, as qat does, and require every one to be adapted and to get a gradient."""
        seen = train_a_step(target_modules=["up_proj", "down_proj"], target_parameters=list(EXPERTS))
        try:
            seen.require()
        except DeadModules as dead:
            return ProbeResult(Status.NEEDED, str(dead))
        return ProbeResult(Status.NOT_NEEDED, f"adapted and trained: {', '.join(seen.adapted)}")


def train_a_step(*, target_modules: Sequence[str] | None, target_parameters: list[str] | None = None) -> Seen:
    """Train LoRA factors on one layer with experts and one with attention; all experts should be adapted, no attention.

    Args:
        target_modules: PEFT's argument.
        target_parameters: PEFT's argument.

    Returns:
        What the guard saw.
    """
    import warnings

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import NemotronHForCausalLM

    modules = None if target_modules is None else list(target_modules)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model: Any = NemotronHForCausalLM(nemotron_h_config("moe", "full_attention", use_cache=False))
        adapter = LoraConfig(r=2, target_modules=modules, target_parameters=target_parameters)
        adapted = get_peft_model(model, adapter)
    tokens = torch.arange(16).view(1, 16)
    wanted = ["*experts.up_proj", "*experts.down_proj"]
    with watch(adapted, adapted=wanted) as seen:
        adapted(input_ids=tokens, labels=tokens).loss.backward()
    return seen


register(PeftFusedExpertsMissed())
