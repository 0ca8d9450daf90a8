"""A small world to train in: a tokenizer of whole words, a template, conversations, a tiny checkpoint, a recipe."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from qat.recipe.schema import Recipe

WORDS = [f"w{number}" for number in range(40)]
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
ROLES = ["system", "user", "assistant"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    """Write a word-level tokenizer with a ChatML-like template into a checkpoint folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *ROLES, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def save_base(folder: Path, seed: int = 0) -> Path:
    """Write the tiny Nemotron-H with its tokenizer."""
    from tests.tiny_models import nemotron_h_tiny, save_tiny

    save_tiny(folder, nemotron_h_tiny(seed))
    save_tokenizer(folder)
    return folder


def save_conversations(path: Path, count: int, seed: int) -> Path:
    """Write conversations whose replies follow from the question: the words backwards, from one of two categories."""
    generator = random.Random(seed)
    lines = []
    for number in range(count):
        asked = [generator.choice(WORDS) for _ in range(generator.randint(2, 12))]
        messages = [
            {"role": "system", "content": "w0 w1"},
            {"role": "user", "content": " ".join(asked)},
            {"role": "assistant", "content": " ".join(reversed(asked))},
        ]
        record = {"messages": messages, "category": ("even", "odd")[number % 2], "id": f"{seed}-{number}"}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe(base: Path, **train: dict[str, Any]) -> Recipe:
    """A recipe for the small world; `train` overrides keys of `sft` and `distill`."""
    sft = {"epochs": 2, "learning_rate": 0.01, "batch_size": 4, "save_every": 3, "early_stopping_patience": 0}
    distill = {"max_steps": 8, "learning_rate": 0.003, "batch_size": 4, "eval_every": 4, "save_every": 3}
    return Recipe.model_validate(
        {
            "name": "small",
            "base": {"model": str(base), "family": "nemotron_h"},
            "persona": "annie_tiny",
            "data": {"source": "generated", "count": 8, "max_length": 64},
            "train": {
                "adapter": {"rank": 4, "alpha": 8.0},
                "sft": sft | train.get("sft", {}),
                "distill": distill | train.get("distill", {}),
            },
            "quant": {"calibration": {"samples": 8, "batch_size": 4}},
            "arms": [
                {"name": "bf16", "kind": "persona"},
                {"name": "ptq", "kind": "ptq", "preset": "all"},
                {"name": "qad", "kind": "distilled", "preset": "all"},
            ],
            "behavior": {"suite": "small", "gate": {"candidate": "qad", "reference": "bf16"}},
        }
    )
