"""What presets, algorithms and byte budgets cost on one fine-tuned persona: the figures of docs/benchmarks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qat.calibration.run import QUANT_STATE, calibrate
from qat.calibration.sensitivity import EVERYTHING, Sensitivity, choose_preset
from qat.quant.presets import PRESETS
from qat.recipe.schema import PresetBlock, Recipe
from qat.train.divergence import measure

ALGORITHMS: dict[str, dict[str, Any]] = {
    "mse": {"algorithm": "mse"},
    "percentile 99.99": {"algorithm": "percentile", "percentile": 99.99},
    "percentile 99.9": {"algorithm": "percentile", "percentile": 99.9},
    "percentile 99": {"algorithm": "percentile", "percentile": 99.0},
}
"""Rows beside `max`: changes of the recipe's calibration block."""
BUDGETS = (0.1, 0.25, 0.5)
"""Of the way from the smallest checkpoint to the BF16 one."""


class Persona(NamedTuple):
    """A fine-tuned persona and what it is measured on.

    Attributes:
        recipe: Of its run.
        base: Folder of the base checkpoint.
        adapter: Of fine-tuning.
        train: Conversations to calibrate on, JSONL.
        held_out: Conversations whose replies are compared, JSONL.
    """

    recipe: Recipe
    base: Path
    adapter: Path
    train: Path
    held_out: Path


def cases(sensitivity: Sensitivity) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name what is measured: a label, and the preset, calibration block and own preset that it takes."""
    smallest, whole = sizes(sensitivity)
    for share in BUDGETS:
        budget = int(smallest + share * (whole - smallest))
        choice, lists = choose_preset(sensitivity, budget)
        facts = {"budget": budget, "bytes": choice.bytes, "sum_of_kl": choice.kl, "exact": choice.exact}
        yield f"mix at {share:.0%}", {"preset": "mine", "own": lists, "facts": facts}
    for label, change in ALGORITHMS.items():
        yield f"all, {label}", {"preset": "all", "calibration": change}
    for preset in PRESETS:
        yield f"{preset}, max", {"preset": preset}


def sizes(sensitivity: Sensitivity) -> tuple[int, int]:
    """Bytes of the checkpoint with every group in NVFP4, and in BF16."""
    four = [score for score in sensitivity.groups if score.format == "nvfp4"]
    fixed = sensitivity.fixed_bytes
    return fixed + sum(score.bytes for score in four), fixed + sum(score.bytes_bf16 for score in four)


def run_case(persona: Persona, case: Mapping[str, Any]) -> dict[str, Any]:
    """Calibrate and measure one case.

    Args:
        persona: Whom.
        case: From `cases`.

    Returns:
        KL, its standard error, top-1 agreement, changed expert choices, and the case's own facts.
    """
    quant = persona.recipe.quant
    block = quant.calibration.model_copy(update=case.get("calibration", {}))
    own = {"mine": PresetBlock.model_validate(case["own"])} if "own" in case else {}
    recipe = persona.recipe.model_copy(
        update={"quant": quant.model_copy(update={"calibration": block, "presets": own})}
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        calibrate(recipe, case["preset"], persona.base, persona.adapter, persona.train, out)
        arms = {"arm": (None, out / QUANT_STATE)}
        found = measure(recipe, persona.base, persona.adapter, arms, persona.held_out)["arm"]
    replies = found.replies
    router = None if found.router is None else found.router.changed
    figures = {"kl": replies.kl, "kl_se": replies.kl_se, "top1": replies.top1, "router_changed": router}
    return {**case.get("facts", {}), **figures}


def page(found: Mapping[str, Any]) -> str:
    """The figures as Markdown.

    Args:
        found: `command`, `environment`, `sensitivity` and `cases` as the script gathers them.
    """
    sensitivity = Sensitivity.from_json(found["sensitivity"])
    lines = [
        "# Calibration: presets, algorithms, sensitivity",
        "",
        f"`{found['command']}`; {found['environment']}. KL to the BF16 persona in nats per reply token, on "
        f"{sensitivity.tokens:,} reply tokens of {sensitivity.conversations} held-out conversations; calibrated, not "
        "distilled. Raw figures: [calibration.json](calibration.json). How: [calibration](../calibration.md).",
        "",
        "## Presets, algorithms and budgets",
        "",
        "| case | KL | ± SE | top-1 | changed expert choices | MB | groups' KL added up |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, row in found["cases"].items():
        size = f"{row['bytes'] / 1e6:.3f}" if "bytes" in row else ""
        total = f"{row['sum_of_kl']:.5f}" if "sum_of_kl" in row else ""
        changed = f"{row['router_changed']:.2%}"
        figures = f"{row['kl']:.5f} | {row['kl_se']:.5f} | {row['top1']:.4f} | {changed}"
        lines.append(f"| {label} | {figures} | {size} | {total} |")
    smallest, whole = sizes(sensitivity)
    lines += ["", f"All NVFP4 {smallest / 1e6:.3f} MB, BF16 {whole / 1e6:.3f} MB (tensors).", ""]
    for title, scores in (("By kind of layer", sensitivity.kinds), ("Group by group", sensitivity.groups)):
        lines += [f"## {title}, each quantized alone", "", "| group | format | KL | ± SE | top-1 | saves MB |"]
        lines.append("|---|---|---|---|---|---|")
        for score in sorted(scores, key=lambda score: (score.group != EVERYTHING, -score.kl)):
            saved = (score.bytes_bf16 - score.bytes) / 1e6
            figures = f"{score.kl:.5f} | {score.kl_se or 0:.5f} | {score.top1:.4f} | {saved:.3f}"
            lines.append(f"| {score.group} | {score.format} | {figures} |")
        lines.append("")
    return "\n".join(lines)
