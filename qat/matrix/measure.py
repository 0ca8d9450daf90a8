"""What is measured of every arm: manners, knowledge, perplexity, divergence from the BF16 persona."""

from __future__ import annotations

import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from qat.behavior.records import Case
from qat.behavior.suite import Suite, load_suite
from qat.data.generate.corpus import documents
from qat.data.render import IGNORED
from qat.data.schema import load_persona
from qat.matrix import design, probes
from qat.matrix.play import manners_of, play
from qat.matrix.texts import rows_of
from qat.recipe.schema import BaseBlock
from qat.train.base import load_base, load_tokenizer
from qat.train.batches import Sample, collate, encode_file
from qat.train.compare import Reference, compare, make_references
from qat.train.objective import hidden_states, logits, output_weight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 96
UNREAD_SEED = 9
"""Of the generated documents on which perplexity is measured; bases are pretrained on seed 1."""
ROWS = 32
"""Rows of a forward of perplexity or knowledge."""
SHOWN = 4
"""Failed replies that a result keeps, to look at."""


class Questions(NamedTuple):
    """What the arms of one base are asked; the same for all of them.

    Attributes:
        suite: The whole suite.
        cases: Those that are played.
        tokenizer: The base's.
        facts: Frame to knowledge probes.
        read: Text to token rows `(rows, length)`, uint16.
        replies: Held-out conversations.
        references: The BF16 persona's answers to them.
    """

    suite: Suite
    cases: tuple[Case, ...]
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, list[Sample]]
    read: dict[str, np.ndarray]
    replies: list[Sample]
    references: list[Reference]


@lru_cache(maxsize=2)
def questions(base: Path, persona: Path, replies: Path, texts: Path | None, scale: design.Scale) -> Questions:
    """Make the questions for one base; kept, as a process measures many of its arms.

    Args:
        base: Folder of the base checkpoint.
        persona: Folder of the merged BF16 persona.
        replies: Held-out conversations, JSONL.
        texts: Folder of `qat.matrix.texts`, where the base has read such texts.
        scale: How much of everything.
    """
    suite = load_suite(design.SUITE)
    tokenizer = load_tokenizer(BaseBlock(model=str(base)), base)
    chosen = probes.probes()[: scale.facts]
    unread = rows_of(list(documents(UNREAD_SEED, 0, 6 * scale.rows_read)), tokenizer, 512)
    read = {"generated": unread[: scale.rows_read]}
    if texts is not None:
        read["real"] = np.load(texts / "held_out.npy")[: scale.rows_read]
    samples = encode_file(replies, tokenizer, 768).samples
    return Questions(
        suite=suite,
        cases=suite.cases[: scale.cases],
        tokenizer=tokenizer,
        facts={
            "chat": probes.in_chat(chosen, tokenizer, load_persona(design.PERSONA)),
            "dialogue": probes.in_dialogue(chosen, tokenizer),
        },
        read=read,
        replies=samples,
        references=make_references(load_base(persona), samples),
    )


def measure(model: torch.nn.Module, asked: Questions) -> dict[str, Any]:
    """Measure a model.

    Args:
        model: In `eval` mode.
        asked: Of its base.

    Returns:
        `passed`, `manners` and `knowledge` as texts of 0 and 1, one digit a case or fact in their order; `checks` that
        were failed; `perplexity` as nats of each row; `divergence`; `seconds` by part.
    """
    seconds: dict[str, float] = {}
    found: dict[str, Any] = {}

    def timed(name: str, value: Any) -> Any:
        seconds[name] = round(time.monotonic() - begun, 1)
        return value

    begun = time.monotonic()
    judged = timed("suite", play(asked.suite, asked.cases, model, asked.tokenizer, MAX_TOKENS))
    manners = manners_of(asked.cases)
    found["passed"] = _digits([not one.failed for one in judged])
    found["manners"] = _digits([not manners & set(one.failed) for one in judged])
    found["checks"] = dict(Counter(check for one in judged for check in one.failed).most_common())
    found["failures"] = [one._asdict() for one in judged if one.failed][:SHOWN]
    begun = time.monotonic()
    found["knowledge"] = {frame: _digits(known(model, rows)) for frame, rows in asked.facts.items()}
    timed("knowledge", None)
    begun = time.monotonic()
    found["perplexity"] = {name: nats(model, rows) for name, rows in asked.read.items()}
    timed("perplexity", None)
    begun = time.monotonic()
    found["divergence"] = compare(model, asked.references, asked.replies).to_json()
    timed("divergence", None)
    return {**found, "seconds": seconds}


def shared(asked: Questions) -> dict[str, Any]:
    """What the digits of `measure` stand for: cases with categories, subjects of the facts, tokens of the rows."""
    return {
        "suite": {"name": asked.suite.name, "version": asked.suite.version, "sha256": asked.suite.sha256},
        "manners": sorted(manners_of(asked.cases)),
        "cases": [case.id for case in asked.cases],
        "subjects": [sample.id for sample in asked.facts["chat"]],
        "tokens": {name: (rows[:, 1:] != 0).sum(axis=1).tolist() for name, rows in asked.read.items()},
    }


@torch.no_grad()
def known(model: torch.nn.Module, rows: list[Sample]) -> list[bool]:
    """Whether the model holds every token of a fact's value most likely, given what stands before it."""
    weight = output_weight(model)
    right = [False] * len(rows)
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row].input_ids))
    for start in range(0, len(order), 4 * ROWS):
        batch = collate(rows, order[start : start + 4 * ROWS], "replies")
        targets = batch.targets.to(weight.device)
        states = hidden_states(model, batch.input_ids.to(weight.device), targets)
        best = torch.full_like(targets, IGNORED)
        best[targets != IGNORED] = logits(states, weight).argmax(dim=-1)
        for row, same in zip(batch.rows, (best == targets).all(dim=1).tolist(), strict=True):
            right[row] = same
    return right


@torch.no_grad()
def nats(model: torch.nn.Module, rows: np.ndarray) -> list[float]:
    """Sum of -log p of every row's tokens but the first; padding (token 0) does not count."""
    weight = output_weight(model)
    sums: list[float] = []
    for start in range(0, len(rows), ROWS):
        ids = torch.from_numpy(rows[start : start + ROWS].astype(np.int64)).to(weight.device)
        targets = torch.full_like(ids, IGNORED)
        targets[:, :-1] = ids[:, 1:].masked_fill(ids[:, 1:] == 0, IGNORED)
        states = hidden_states(model, ids, targets)
        losses = torch.zeros(targets.shape, device=weight.device)
        losses[targets != IGNORED] = torch.nn.functional.cross_entropy(
            logits(states, weight), targets[targets != IGNORED], reduction="none"
        )
        sums += [round(value, 3) for value in losses.double().sum(dim=1).tolist()]
    return sums


def _digits(values: list[bool]) -> str:
    return "".join(str(int(value)) for value in values)
