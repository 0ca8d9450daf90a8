"""Rows on which the persona has written the reply itself (on-policy for the model that is to be preserved).

On the conversations' own replies the student sees the states that a careful author leads into; served, it sees those
that its own words lead into, and the persona's words are the nearest thing to them that the teacher can write before
training begins. Such a row is a training conversation up to its last reply, and there what the persona says instead.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qat.data.render import IGNORED
from qat.errors import UserError
from qat.progress import progress_bar
from qat.storage import write_atomic
from qat.train.batches import Sample, encode_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qat.recipe.schema import RepliesBlock

ROWS_TOGETHER = 16
"""Most prompts of one length that are answered together (none is padded: a state-space layer reads padding)."""


def persona_replies(
    persona: PreTrainedModel,
    samples: Sequence[Sample],
    block: RepliesBlock,
    *,
    max_length: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    keep: Path,
    fingerprint: str,
) -> list[Sample]:
    """Give the rows that a recipe asks for, from its file or written by the persona now.

    Args:
        persona: The teacher, in `eval` mode.
        samples: Training rows, whose last reply is written anew.
        block: How many rows, or which file; sampling.
        max_length: Longest row in tokens.
        seed: Of the sampling.
        tokenizer: For a file.
        keep: Where written rows are kept, so that a run that goes on after a kill has the same ones.
        fingerprint: Of everything that they follow from.

    Returns:
        Rows whose ids end in `/persona`; of a conversation that leaves no room for a reply there is none.

    Raises:
        UserError: The file is faulty, there are fewer training rows than asked for, or the persona wrote nothing.
    """
    if block.file is not None:
        rows = encode_file(Path(block.file), tokenizer, max_length).samples
        return [row._replace(id=f"{row.id}/persona") for row in rows]
    if block.count is None or block.count > len(samples):
        raise UserError(
            "The persona cannot answer more conversations than there are.",
            where="train.distill.replies.count",
            value=f"{block.count}, {len(samples)} training conversations",
            remedy="lower it, or give more conversations",
        )
    if (kept := _kept(keep, fingerprint)) is not None:
        return kept
    chosen = [samples[index * len(samples) // block.count] for index in range(block.count)]
    written = _write(persona, chosen, block, max_length, seed)
    if not written:
        raise UserError("The persona wrote no reply.", where="data.max_length", value=max_length, remedy="raise it")
    lines = [json.dumps({"fingerprint": fingerprint}), *(json.dumps(row._asdict()) for row in written)]
    write_atomic(keep, "\n".join(lines) + "\n")
    return written


def _kept(path: Path, fingerprint: str) -> list[Sample] | None:
    if not path.is_file():
        return None
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    if json.loads(first)["fingerprint"] != fingerprint:
        return None
    return [Sample(**json.loads(line)) for line in lines]


@torch.no_grad()
def _write(
    persona: PreTrainedModel, samples: Sequence[Sample], block: RepliesBlock, max_length: int, seed: int
) -> list[Sample]:
    from transformers import GenerationConfig

    end = _end_of_turn(samples)
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(_last_reply(sample), []).append(sample)
    batches = [
        (start, rows[first : first + ROWS_TOGETHER])
        for start, rows in sorted(groups.items())
        for first in range(0, len(rows), ROWS_TOGETHER)
        if start < max_length
    ]
    written: list[Sample] = []
    devices = [persona.device] if persona.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), progress_bar("the persona answers", len(batches)) as bar:
        torch.manual_seed(seed)
        for done, (start, rows) in enumerate(batches):
            settings = GenerationConfig(
                max_new_tokens=min(block.max_new_tokens, max_length - start),
                do_sample=block.temperature > 0,
                temperature=block.temperature or None,
                top_p=block.top_p,
                top_k=0,
                eos_token_id=end,
                pad_token_id=end,
                use_cache=True,
            )
            ids = torch.tensor([row.input_ids[:start] for row in rows], device=persona.device)
            # No padding, so every token counts: said, because `generate` would guess it from the padding token.
            produced = persona.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            for row, tokens in zip(rows, produced[:, start:].tolist(), strict=True):
                reply = tokens[: tokens.index(end) + 1] if end in tokens else tokens
                input_ids = [*row.input_ids[:start], *reply]
                labels = [IGNORED] * start + reply
                written.append(Sample(f"{row.id}/persona", row.category, input_ids, labels))
            bar.update(done + 1)
    return written


def _last_reply(sample: Sample) -> int:
    """Where the last reply begins: behind the last token before it that no assistant wrote."""
    last = max(index for index, label in enumerate(sample.labels) if label != IGNORED)
    before = [index for index in range(last) if sample.labels[index] == IGNORED]
    return before[-1] + 1 if before else 0


def _end_of_turn(samples: Sequence[Sample]) -> int:
    """The token with which replies end: the commonest last one, as rows that were cut end anywhere."""
    last = Counter(next(label for label in reversed(sample.labels) if label != IGNORED) for sample in samples)
    return last.most_common(1)[0][0]
