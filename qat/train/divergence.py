"""How far every arm is from the BF16 persona on held-out replies.

The same numbers as distillation's validation, and how many expert choices the arm's routers make otherwise at the same
positions.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft import PeftModel

from qat.data.render import IGNORED
from qat.progress import progress_bar
from qat.train.adapters import load_adapter, use_effective_weights_
from qat.train.base import base_sha256, load_base, load_tokenizer
from qat.train.batches import encode_file
from qat.train.compare import Divergence, compare, make_references
from qat.train.persona import is_model, load_persona, persona_sha256, standing_on
from qat.train.routing import RouterStability, compare_choices, record_choices
from qat.train.student import load_quant_state, quantize_

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qat.recipe.schema import Recipe


class ArmDivergence(NamedTuple):
    """How far an arm is from the BF16 persona.

    Attributes:
        replies: In the probabilities of reply tokens.
        router: In the experts chosen; None for a dense model.
    """

    replies: Divergence
    router: RouterStability | None

    def to_json(self) -> dict[str, Any]:
        """The fields of `divergence.json`."""
        return {**self.replies.to_json(), "router": None if self.router is None else self.router._asdict()}


def measure(
    recipe: Recipe,
    base: Path,
    persona_adapter: Path,
    arms: Mapping[str, tuple[Path | None, Path | None]],
    file: Path,
) -> dict[str, ArmDivergence]:
    """Measure arms against the persona.

    Args:
        recipe: Chat template and length.
        base: Folder of the base checkpoint.
        persona_adapter: Adapter of fine-tuning.
        arms: Name -> (adapter or model of distillation or None, quantizer state or None). (None, None) is the persona
            itself.
        file: Held-out conversations, JSONL.

    Returns:
        Name -> divergence.

    Raises:
        UserError: A file, adapter or state does not fit.
    """
    sha256 = standing_on(base, persona_adapter)
    samples = encode_file(file, load_tokenizer(recipe.base, base), recipe.data.max_length).samples
    persona = load_persona(base, persona_adapter, sha256)
    with record_choices(persona) as expected:
        references = make_references(persona, samples)
    # The first arm begins with this network, and only one need fit into memory.
    loaded: PreTrainedModel | None = persona
    del persona
    counted = [(reference.batch.targets != IGNORED).reshape(-1) for reference in references]
    results: dict[str, ArmDivergence] = {}
    with progress_bar("divergence", len(arms)) as bar:
        for done, (name, (adapter, state)) in enumerate(arms.items()):
            if adapter is not None and is_model(adapter):
                loaded = None  # it has weights of its own
                gc.collect()
            model, standing = _network(base, persona_adapter, sha256, adapter, loaded)
            loaded = None
            if state is not None:
                quantize_(model, base, load_quant_state(state, base, standing))
            elif isinstance(model, PeftModel):
                use_effective_weights_(model)
            with record_choices(model) as choices:
                replies = compare(model, references, samples)
            results[name] = ArmDivergence(replies, compare_choices(expected, choices, counted))
            bar.update(done + 1, f"{name} KL {replies.kl:.4f}")
            # Quantizers and wrappers change a network for good; replaced forwards hold it in circles.
            del model
            gc.collect()
    return results


def _network(
    base: Path, persona: Path, sha256: str, adapter: Path | None, loaded: PreTrainedModel | None
) -> tuple[torch.nn.Module, str]:
    """An arm's network before quantization, and what its quantizer state stands on.

    Args:
        base: Folder of the base checkpoint.
        persona: What fine-tuning left.
        sha256: What the persona stands on.
        adapter: What distillation left; None for an arm without.
        loaded: The persona's network where it is there already.
    """
    if adapter is not None and is_model(adapter):
        return load_base(adapter), base_sha256(adapter)
    model = load_persona(base, persona, sha256) if loaded is None else loaded
    if adapter is None:
        return model, sha256
    return load_adapter(model, adapter, sha256, parent=persona_sha256(persona)), sha256
