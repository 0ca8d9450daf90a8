"""The calibration: the persona reads chosen conversations, calibrators set ranges, they are shared and saved."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qat.calibration.coverage import TOO_FEW_TOKENS, ExpertTokens, count_expert_tokens, remedy
from qat.calibration.samples import choose_samples, unpadded_batches
from qat.progress import progress_bar
from qat.quant import modelopt
from qat.quant.presets import preset_of
from qat.quant.state import QuantState
from qat.train.base import load_tokenizer
from qat.train.batches import Sample, encode_file
from qat.train.objective import causal_lm
from qat.train.persona import load_persona, standing_on

if TYPE_CHECKING:
    from qat.recipe.schema import CalibrationBlock, Recipe

QUANT_STATE = "quant_state.safetensors"


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration did.

    Attributes:
        preset: Precision preset.
        algorithm: How ranges followed from what was seen.
        base_sha256: Of the weights below the quantizers (`qat.train.persona.standing_on`).
        formats: Modules in each format.
        quantized: Modules with ranges.
        skipped: Linears and fused experts left in BF16.
        groups: Modules that share ranges.
        conversations: Chosen conversations by category.
        tokens: Tokens they have.
        truncated: Conversations of the file that were cut at the recipe's length.
        experts: Routed tokens per expert and layer.
        starved: Layer -> expert -> tokens, for experts with fewer than `TOO_FEW_TOKENS`.
        remedy: What would give these enough; None where there are none.
    """

    preset: str
    algorithm: str
    base_sha256: str
    formats: dict[str, int]
    quantized: int
    skipped: list[str]
    groups: list[list[str]]
    conversations: dict[str, int]
    tokens: int
    truncated: int
    experts: list[ExpertTokens]
    starved: dict[str, dict[int, int]]
    remedy: str | None

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return {
            "preset": self.preset,
            "algorithm": self.algorithm,
            "formats": self.formats,
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
            "remedy": self.remedy,
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
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    rule = preset_of(preset, recipe.quant.presets, config)
    sha256 = standing_on(base, persona_adapter)
    encoded = encode_file(train_file, load_tokenizer(recipe.base, base), recipe.data.max_length)
    lengths = [len(sample.input_ids) for sample in encoded.samples]
    categories = [sample.category for sample in encoded.samples]
    chosen = choose_samples(categories, lengths, block.samples, recipe.seed)
    model = load_persona(base, persona_adapter, sha256)
    inserted = modelopt.insert_quantizers(model, rule, config)
    groups, experts = set_ranges(model, block, encoded.samples, chosen, preset)
    state: QuantState = modelopt.collect_state(model, inserted, kv_cache=recipe.quant.kv_cache, base_sha256=sha256)
    out.mkdir(parents=True, exist_ok=True)
    state.save(out / QUANT_STATE)
    return CalibrationReport(
        preset=preset,
        algorithm=block.algorithm,
        base_sha256=sha256,
        formats=dict(Counter(module.format for module in state.modules.values())),
        quantized=len(inserted.quantized),
        skipped=inserted.skipped,
        groups=groups,
        conversations=dict(sorted(Counter(categories[row] for row in chosen).items())),
        tokens=sum(lengths[row] for row in chosen),
        truncated=encoded.truncated,
        experts=experts,
        starved={layer.layer: layer.starved for layer in experts if layer.starved},
        remedy=remedy(experts, len(chosen), len(lengths)),
    )


def set_ranges(
    model: torch.nn.Module, block: CalibrationBlock, samples: list[Sample], chosen: list[int], label: str
) -> tuple[list[list[str]], list[ExpertTokens]]:
    """Let a model with quantizers read the chosen conversations, one batch at a time, and set its ranges.

    Args:
        model: After `insert_quantizers`.
        block: Batch size and algorithm.
        samples: All rows.
        chosen: Which of them are read.
        label: For the progress bar.

    Returns:
        The groups that share ranges, and the tokens that each expert saw.

    Raises:
        UserError: A quantizer saw no usable range.
    """
    batches = unpadded_batches([len(sample.input_ids) for sample in samples], chosen, block.batch_size)
    seen: list[ExpertTokens] = []

    def read(network: torch.nn.Module) -> None:
        with count_expert_tokens(network) as counted:
            _read(network, samples, batches, label)
        seen[:] = counted  # the search of `mse` reads the same conversations a second time

    groups = modelopt.calibrate(model, read, algorithm=block.algorithm, percentile=block.percentile)
    return groups, seen


@torch.no_grad()
def _read(model: torch.nn.Module, samples: list[Sample], batches: list[list[int]], label: str) -> None:
    """Run the batches through the network up to its output layer, one at a time; nothing is kept."""
    inner = causal_lm(model)
    inner.eval()
    device = next(inner.parameters()).device
    with progress_bar(f"calibrating {label}", len(batches)) as bar:
        for done, rows in enumerate(batches):
            ids = torch.tensor([samples[row].input_ids for row in rows], device=device)
            inner.base_model(input_ids=ids, use_cache=False)
            bar.update(done + 1)
