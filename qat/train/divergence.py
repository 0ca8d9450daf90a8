"""How far every arm is from the BF16 persona on held-out replies.

The same numbers as distillation's validation, and how many expert choices the arm's routers make otherwise at the same
positions.
"""

from __future__ import annotations

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
    counted = [(reference.batch.targets != IGNORED).reshape(-1) for reference in references]
    results: dict[str, ArmDivergence] = {}
    with progress_bar("divergence", len(arms)) as bar:
        for done, (name, (adapter, state)) in enumerate(arms.items()):
            # Quantizers and wrappers change the network for good, so every arm starts from a persona of its own.
            model: torch.nn.Module = persona if done == 0 else load_persona(base, persona_adapter, sha256)
            standing = sha256
            if adapter is not None and is_model(adapter):
                model, standing = load_base(adapter), base_sha256(adapter)
            elif adapter is not None:
                model = load_adapter(model, adapter, sha256, parent=persona_sha256(persona_adapter))
            if state is not None:
                quantize_(model, base, load_quant_state(state, base, standing))
            elif isinstance(model, PeftModel):
                use_effective_weights_(model)
            with record_choices(model) as choices:
                replies = compare(model, references, samples)
            results[name] = ArmDivergence(replies, compare_choices(expected, choices, counted))
            bar.update(done + 1, f"{name} KL {replies.kl:.4f}")
    return results
