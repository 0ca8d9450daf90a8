"""The calibration: the persona reads chosen conversations, ModelOpt takes the maxima, ranges are shared and written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qat.calibration.coverage import TOO_FEW_TOKENS, ExpertTokens, count_expert_tokens
from qat.calibration.samples import choose_samples, unpadded_batches
from qat.progress import progress_bar
from qat.quant import modelopt
from qat.quant.state import QuantState
from qat.train.base import base_sha256, load_tokenizer
from qat.train.batches import Sample, encode_file
from qat.train.objective import causal_lm
from qat.train.persona import load_persona

if TYPE_CHECKING:
    from qat.recipe.schema import Recipe

QUANT_STATE = "quant_state.safetensors"


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration did.

    Attributes:
        preset: Precision preset.
        base_sha256: Of the base's weights.
        quantized: Modules with ranges.
        skipped: Linears and fused experts left in BF16.
        groups: Modules that share ranges.
        conversations: Chosen conversations by category.
        tokens: Tokens they have.
        truncated: Conversations of the file that were cut at the recipe's length.
        experts: Routed tokens per expert and layer.
        starved: Layer -> expert -> tokens, for experts with fewer than `TOO_FEW_TOKENS`.
    """

    preset: str
    base_sha256: str
    quantized: int
    skipped: list[str]
    groups: list[list[str]]
    conversations: dict[str, int]
    tokens: int
    truncated: int
    experts: list[ExpertTokens]
    starved: dict[str, dict[int, int]]

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return {
            "preset": self.preset,
            "base_sha256": self.base_sha256,
            "quantized": self.quantized,
            "skipped": self.skipped,
            "groups": self.groups,
            "conversations": self.conversations,
            "tokens": self.tokens,
            "truncated": self.truncated,
            "experts": {layer: tokens for layer, tokens in self.experts},
            "starved": {
                layer: {str(expert): count for expert, count in experts.items()}
                for layer, experts in self.starved.items()
            },
            "too_few_tokens": TOO_FEW_TOKENS,
        }


def calibrate(
    recipe: Recipe, preset: str, base: Path, persona_adapter: Path, train_file: Path, out: Path
) -> CalibrationReport:
    """Set the ranges of a preset's quantizers on the persona.

    Args:
        recipe: Calibration block, chat template, length, KV cache.
        preset: Precision preset.
        base: Folder of the base checkpoint.
        persona_adapter: Adapter of fine-tuning.
        train_file: Conversations, JSONL; some of them are chosen.
        out: Folder for `quant_state.safetensors`.

    Returns:
        What was done.

    Raises:
        UserError: A file does not fit, the preset does not fit the model, or a quantizer saw no usable range.
    """
    block = recipe.quant.calibration
    sha256 = base_sha256(base)
    encoded = encode_file(train_file, load_tokenizer(recipe.base, base), recipe.data.max_length)
    samples = encoded.samples
    lengths = [len(sample.input_ids) for sample in samples]
    chosen = choose_samples([sample.category for sample in samples], lengths, block.samples, recipe.seed)
    batches = unpadded_batches(lengths, chosen, block.batch_size)
    model = load_persona(base, persona_adapter, sha256)
    inserted = modelopt.insert_quantizers(model, preset, json.loads((base / "config.json").read_text(encoding="utf-8")))
    with count_expert_tokens(model) as experts:
        groups = modelopt.calibrate(model, lambda network: _read(network, samples, batches, preset))
    state: QuantState = modelopt.collect_state(model, inserted, kv_cache=recipe.quant.kv_cache, base_sha256=sha256)
    out.mkdir(parents=True, exist_ok=True)
    state.save(out / QUANT_STATE)
    by_category: dict[str, int] = {}
    for row in chosen:
        by_category[samples[row].category] = by_category.get(samples[row].category, 0) + 1
    return CalibrationReport(
        preset=preset,
        base_sha256=sha256,
        quantized=len(inserted.quantized),
        skipped=inserted.skipped,
        groups=groups,
        conversations=dict(sorted(by_category.items())),
        tokens=sum(lengths[row] for row in chosen),
        truncated=encoded.truncated,
        experts=experts,
        starved={layer.layer: layer.starved for layer in experts if layer.starved},
    )


@torch.no_grad()
def _read(model: torch.nn.Module, samples: list[Sample], batches: list[list[int]], preset: str) -> None:
    """Run the batches through the network up to its output layer, one at a time; nothing is kept."""
    inner = causal_lm(model)
    inner.eval()
    device = next(inner.parameters()).device
    with progress_bar(f"calibrating {preset}", len(batches)) as bar:
        for done, rows in enumerate(batches):
            ids = torch.tensor([samples[row].input_ids for row in rows], device=device)
            inner.base_model(input_ids=ids, use_cache=False)
            bar.update(done + 1)
