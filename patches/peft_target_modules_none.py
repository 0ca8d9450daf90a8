"""PEFT adds attention to an adapter that names only parameters."""

from __future__ import annotations

from qat.patches.peft_fused_experts_missed import EXPERTS, train_a_step
from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register


class PeftTargetModulesNone:
    """Nothing to patch: an empty list says what None does not."""

    name = "peft_target_modules_none"
    title = "target_modules=None beside target_parameters adapts the attention too"
    breaks = "Silent: PEFT fills in its default for the model type; an adapter for experts also trains q, k, v and o."
    upstream = "peft/tuners/lora/model.py: _prepare_adapter_config"
    affects = "peft 0.21.2, model types in its table of default targets (nemotron_h among them)"
    libraries = ("peft", "transformers")
    place = Place.HERE
    repair = (
        "qat always passes a list or pattern, and compares what PEFT adapted with what the recipe asked for. Elsewhere "
        "pass target_modules=[] for experts alone."
    )

    def probe(self) -> ProbeResult:
        """Name the experts' parameters and leave `target_modules` out."""
        unasked = train_a_step(target_modules=None, target_parameters=list(EXPERTS)).dead.unasked_adapters
        if unasked:
            return ProbeResult(Status.NEEDED, f"adapted although not asked for: {', '.join(unasked)}")
        return ProbeResult(Status.NOT_NEEDED, "only the named parameters are adapted")

    def verify(self) -> ProbeResult:
        """Pass an empty list."""
        seen = train_a_step(target_modules=[], target_parameters=[EXPERTS[0]])
        if seen.dead.unasked_adapters:
            return ProbeResult(Status.NEEDED, ", ".join(seen.dead.unasked_adapters))
        return ProbeResult(Status.NOT_NEEDED, f"adapted: {', '.join(seen.adapted)}")


register(PeftTargetModulesNone())
