"""Lengths of conversation sets under a base's chat template, and what fine-tuning on them takes by measured steps.

python scripts/project_lengths.py --real FOLDER --out docs/benchmarks/plan_lengths.json

FOLDER holds public files: `chat_templates_llamacpp`, `qwen3_tokenizer`, and the conversation sets below. Nano's own
tokenizer is not among them; Qwen3's vocabulary of 151,936 stands in for its 131,072.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from qat.data.generate import conversations
from qat.data.load import load_conversations
from qat.data.schema import load_persona
from qat.data.templates import render_template
from qat.plan.gpus import GPUS
from qat.plan.shape import CARDS
from qat.plan.timing import seconds, shipped_error, shipped_factors
from qat.plan.work import Step, read_network
from qat.storage import write_json
from qat.train.batches import training_order

TEMPLATE = "chat_templates_llamacpp/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.jinja"
REAL = {
    "FastChat's dummy conversations": "fastchat/dummy_conversation.json",
    "LLaMA-Factory's Glaive tool calls": "llamafactory_demo/glaive_toolcall_en_demo.json",
    "LLaMA-Factory's identity": "llamafactory_demo/identity.json",
    "Raschka's instruction data": "rasbt_instruction/instruction-data.json",
}
CONVERSATIONS, EPOCHS, ROWS, LONGEST, SEED = 999, 3, 8, 2048, 7
BATCH_TOKENS = 8 * 2048
# How Qwen2's and Qwen3's tokenizers cut a text before the byte pairs are joined.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def main() -> None:
    """Count, project, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, required=True, help="folder of public data files")
    parser.add_argument("--whole", type=Path, default=Path("docs/benchmarks/train_whole.json"), help="measured steps")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    args = parser.parse_args()
    steps = _measured(args.whole)
    template = (args.real / TEMPLATE).read_text(encoding="utf-8")
    tokenizer = qwen3(args.real / "qwen3_tokenizer")
    found = {name: projected(_lengths(rows, template, tokenizer), steps) for name, rows in _sets(args.real).items()}
    about = {
        "command": f"python scripts/project_lengths.py --real FOLDER --out {args.out}",
        "python": sys.version.split()[0],
        "template": TEMPLATE,
        "tokenizer": "Qwen3's vocabulary and merges; the base's own was not available",
        "training": f"{CONVERSATIONS} conversations x {EPOCHS} epochs, LoRA r16 on attention, cut at {LONGEST} tokens",
        "steps": steps,
        "model_error": round(shipped_error(), 3),
        "sets": found,
    }
    write_json(args.out, about)
    print(markdown(found))


def _measured(file: Path) -> dict[str, float]:
    """Seconds a token: as installed, one row of 1,024; ours in batches of 16,384 tokens, recomputed."""
    rows = [row for row in json.loads(file.read_text(encoding="utf-8"))["measurements"] if row["kind"] == "step"]
    installed = next(row for row in rows if row["arm"] == "installed")
    ours = next(row for row in rows if row["arm"] == "attention" and row["batch"] * row["length"] == BATCH_TOKENS)
    return {
        "installed_s_per_1024": installed["median"] * 1024 / installed["length"],
        "ours_s_per_16384": ours["median"],
    }


def qwen3(folder: Path) -> Tokenizer:
    """Qwen3's tokenizer from its vocabulary and merges, as Transformers converts it."""
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    added = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in sorted(added, key=added.__getitem__)])
    return tokenizer


def _sets(real: Path) -> dict[str, list[dict[str, Any]]]:
    """Conversations with the tools they are rendered with."""
    found: dict[str, list[dict[str, Any]]] = {}
    turns = conversations(load_persona("annie_tiny"), CONVERSATIONS, 11)
    for name, label in (("annie_tiny", "generated"), ("annie", "generated turns under annie's prompt and tools")):
        persona = load_persona(name)
        system = {"role": "system", "content": persona.system_prompt}
        found[label] = [
            {"messages": [system, *_without_system(one["messages"])], "tools": persona.tools} for one in turns
        ]
    for label, file in REAL.items():
        read = load_conversations(real / file)
        found[label] = [{"messages": one["messages"], "tools": one.get("tools") or []} for one in read]
    return found


def _without_system(messages: Sequence[Any]) -> list[Any]:
    return [message for message in messages if message["role"] != "system"]


def _lengths(rows: list[dict[str, Any]], template: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of each conversation as the base's template writes it; those that it refuses are left out."""
    texts = []
    for start in range(0, len(rows), 200):
        requests = [{**row, "enable_thinking": False} for row in rows[start : start + 200]]
        texts += [rendering.text for rendering in render_template(template, requests) if not rendering.error]
    return [len(found.ids) for found in tokenizer.encode_batch(texts, add_special_tokens=False)]


def projected(lengths: list[int], steps: dict[str, float]) -> dict[str, Any]:
    """The distribution, and the seconds of the training with rows drawn from it in turn."""
    rows = [min(lengths[number % len(lengths)], LONGEST) for number in range(CONVERSATIONS)]
    mean = statistics.fmean(rows)
    installed = EPOCHS * sum(rows) / 1024 * steps["installed_s_per_1024"]
    full = training_order(rows, max(1, round(BATCH_TOKENS / mean)), SEED, epochs=EPOCHS)
    padded = sum(len(batch) * max(rows[row] for row in batch) for batch in full)
    as_measured = padded / BATCH_TOKENS * steps["ours_s_per_16384"]
    eights = training_order(rows, ROWS, SEED, epochs=EPOCHS)
    modelled = sum(_step_seconds(len(batch), max(rows[row] for row in batch)) for batch in eights)
    return {
        "conversations": len(lengths),
        "mean": round(statistics.fmean(lengths), 1),
        "quantiles_5_25_50_75_95": [round(value) for value in _quantiles(lengths)],
        "longest": max(lengths),
        "cut": sum(length > LONGEST for length in lengths),
        "tokens": EPOCHS * sum(rows),
        "installed_s": round(installed, 1),
        "full_batches": {
            "rows": len(full[0]),
            "padding": round(padded / (EPOCHS * sum(rows)) - 1, 4),
            "seconds": round(as_measured, 1),
            "times_faster": round(installed / as_measured, 1),
        },
        "eight_rows_a_step": {
            "steps": len(eights),
            "seconds": round(modelled, 1),
            "times_faster": round(installed / modelled, 1),
        },
    }


def _step_seconds(rows: int, length: int) -> float:
    config = json.loads((CARDS / "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.json").read_text(encoding="utf-8"))
    network = read_network(config["config"])
    adapted = {weight.name for weight in network.named(["attention"])}
    step = Step(rows * length, length, rows * length, checkpointing=True, adapted=adapted, route="cheapest")
    return seconds(network.work(step), GPUS["h200"], shipped_factors())


def _quantiles(lengths: list[int]) -> list[float]:
    cuts = statistics.quantiles(lengths, n=20, method="inclusive")
    return [cuts[0], cuts[4], cuts[9], cuts[14], cuts[18]]


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """The table of docs/benchmarks/train_steps.md."""
    lines = [
        "| conversations | mean tokens (5-95 %) | as installed, one by one | qat, 8 rows a step | qat, full batches |",
        "|---|---|---|---|---|",
    ]
    for name, row in found.items():
        low, *_, high = row["quantiles_5_25_50_75_95"]
        cells = [name, f"{row['mean']:,.0f} ({low:,} to {high:,})", f"{row['installed_s'] / 3600:.2f} h"]
        for way in ("eight_rows_a_step", "full_batches"):
            cells.append(f"{row[way]['seconds'] / 60:.1f} min, {row[way]['times_faster']:.0f} x")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
