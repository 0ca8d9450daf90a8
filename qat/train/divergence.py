"""How far every arm is from the BF16 persona on held-out replies: the same numbers as distillation's validation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qat.progress import progress_bar
from qat.train.adapters import adapter_sha256, load_adapter, use_effective_weights_
from qat.train.base import base_sha256, load_tokenizer
from qat.train.batches import encode_file
from qat.train.compare import Divergence, compare, make_references
from qat.train.persona import load_persona
from qat.train.student import load_quant_state, quantize_

if TYPE_CHECKING:
    import torch

    from qat.recipe.schema import Recipe

__all__ = ["Divergence", "measure"]


def measure(
    recipe: Recipe,
    base: Path,
    persona_adapter: Path,
    arms: Mapping[str, tuple[Path | None, Path | None]],
    file: Path,
) -> dict[str, Divergence]:
    """Measure arms against the persona.

    Args:
        recipe: Chat template and length.
        base: Folder of the base checkpoint.
        persona_adapter: Adapter of fine-tuning.
        arms: Name -> (adapter of distillation or None, quantizer state or None). (None, None) is the persona itself.
        file: Held-out conversations, JSONL.

    Returns:
        Name -> divergence.

    Raises:
        UserError: A file, adapter or state does not fit.
    """
    sha256 = base_sha256(base)
    samples = encode_file(file, load_tokenizer(recipe.base, base), recipe.data.max_length).samples
    persona = load_persona(base, persona_adapter, sha256)
    references = make_references(persona, samples)
    results: dict[str, Divergence] = {}
    with progress_bar("divergence", len(arms)) as bar:
        for done, (name, (adapter, state)) in enumerate(arms.items()):
            # Quantizers and wrappers change the network for good, so every arm starts from a persona of its own.
            model: torch.nn.Module = persona if done == 0 else load_persona(base, persona_adapter, sha256)
            if adapter is not None:
                model = load_adapter(model, adapter, sha256, parent=adapter_sha256(persona_adapter))
            if state is not None:
                quantize_(model, base, load_quant_state(state, base, sha256))
            elif adapter is not None:
                use_effective_weights_(model)
            results[name] = compare(model, references, samples)
            bar.update(done + 1, f"{name} KL {results[name].kl:.4f}")
    return results
