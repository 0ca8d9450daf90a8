"""From conversations to batches: token rows, which rows go together, and in which order.

The order is a pure function of lengths and seed, for the whole training at once: a run that was killed finds its place
by counting.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qat.data.load import load_conversations
from qat.data.render import IGNORED, render
from qat.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

POOL = 8
"""Batches whose rows are sorted by length together: more pads less, fewer mixes better."""

EVALUATION_BATCH = 8
"""Rows per validation forward; fixed, so that every validation of a file sums in the same order."""


class Sample(NamedTuple):
    """One training row.

    Attributes:
        id: Of the conversation.
        category: Of the conversation.
        input_ids: Token ids.
        labels: Same length; the id where an assistant wrote it, else `IGNORED`. Not shifted.
    """

    id: str
    category: str
    input_ids: list[int]
    labels: list[int]


class Batch(NamedTuple):
    """Rows of one forward, padded on the right.

    No attention mask: the model is causal in attention, convolution and scan, so what stands behind a row cannot reach
    it, and positions behind a row have no target.

    Attributes:
        rows: Which samples these are.
        input_ids: (rows, tokens), int64.
        targets: (rows, tokens), int64; the token that follows each position where its prediction counts, else
            `IGNORED`.
    """

    rows: list[int]
    input_ids: Tensor
    targets: Tensor


class Encoded(NamedTuple):
    """A file of conversations as rows.

    Attributes:
        samples: One per conversation, in the file's order.
        truncated: Conversations cut at `max_length`.
        dropped_tokens: Tokens lost by that.
    """

    samples: list[Sample]
    truncated: int
    dropped_tokens: int


def encode_file(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Render the conversations of a JSONL file.

    Args:
        path: The file.
        tokenizer: With chat template.
        max_length: Longest row in tokens.

    Raises:
        UserError: The file is faulty or empty, or a conversation cannot be rendered.
    """
    samples, truncated, dropped = [], 0, 0
    for conversation in load_conversations(path):
        rendered = render(conversation, tokenizer, max_length=max_length)
        truncated += rendered.dropped > 0
        dropped += rendered.dropped
        samples.append(Sample(conversation["id"], conversation["category"], rendered.input_ids, rendered.labels))
    if not samples:
        raise UserError("The file holds no conversation.", where=str(path))
    return Encoded(samples, truncated, dropped)


def training_order(
    lengths: Sequence[int], batch_size: int, seed: int, count: int | None = None, epochs: int = 1
) -> list[list[int]]:
    """Lay down which rows go into which batch, for the whole training.

    Every pass over the data is a fresh permutation, cut into pools of `POOL` batches; rows of a pool are sorted by
    length into batches, and these are shuffled over the whole pass. A pass visits each row once; its last batch may be
    smaller.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows per batch.
        seed: Of the order.
        count: Number of batches; None for `epochs` whole passes.
        epochs: Passes where `count` is None.

    Returns:
        Batches of row numbers.
    """
    order: list[list[int]] = []
    epoch = 0
    while len(order) < count if count is not None else epoch < epochs:
        # A text seeds Python's generator through SHA-512, the same on every machine.
        shuffle = random.Random(f"{seed}/{epoch}")
        rows = list(range(len(lengths)))
        shuffle.shuffle(rows)
        batches = []
        for start in range(0, len(rows), POOL * batch_size):
            pool = sorted(rows[start : start + POOL * batch_size], key=lambda row: -lengths[row])
            batches += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
        shuffle.shuffle(batches)
        order += batches
        epoch += 1
    return order[:count]


def evaluation_order(lengths: Sequence[int]) -> list[list[int]]:
    """Batches of `EVALUATION_BATCH` rows in falling length; every row once, always the same."""
    rows = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [rows[start : start + EVALUATION_BATCH] for start in range(0, len(rows), EVALUATION_BATCH)]


def target_mask(sample: Sample, tokens: str) -> list[bool]:
    """Which positions of a row have a prediction that counts.

    Args:
        sample: The row.
        tokens: `replies`: the following token was written by an assistant; `all`: there is a following token.

    Returns:
        One flag per position; the last position predicts nothing.
    """
    if tokens == "all":
        return [True] * (len(sample.input_ids) - 1) + [False]
    return [label != IGNORED for label in sample.labels[1:]] + [False]


def collate(samples: Sequence[Sample], rows: Sequence[int], tokens: str) -> Batch:
    """Pad rows to a batch.

    Args:
        samples: All rows.
        rows: Which of them.
        tokens: As for `target_mask`.
    """
    import torch

    chosen = [samples[row] for row in rows]
    width = max(len(sample.input_ids) for sample in chosen)
    input_ids = torch.zeros((len(chosen), width), dtype=torch.long)
    targets = torch.full((len(chosen), width), IGNORED, dtype=torch.long)
    for index, sample in enumerate(chosen):
        length = len(sample.input_ids)
        ids = torch.tensor(sample.input_ids)
        input_ids[index, :length] = ids
        mask = torch.tensor(target_mask(sample, tokens)[:-1], dtype=torch.bool)
        targets[index, : length - 1][mask] = ids[1:][mask]
    return Batch(list(rows), input_ids, targets)
