"""Knowledge, apart from manners: does a model still know the world's facts, whatever its tone?

Every well-known fact is asked once, in wordings that the base has read. The answer is given up to the fact's value and
the model must go on with the value: what counts is whether it holds each token of it most likely. So neither a cheer
before the answer nor a question after it can cost a point. Asked twice: in a chat with the persona's prompt, where the
manners are measured too, and as a plain dialogue, the form that the base has read and fine-tuning never showed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from qat.data.generate.turns import Draw, fact
from qat.data.generate.voices import plain
from qat.data.generate.world import facts_of, subjects
from qat.data.render import IGNORED
from qat.train.batches import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qat.data.schema import Persona


class Probe(NamedTuple):
    """One fact, asked.

    Attributes:
        subject: Whom or what it is about: the cluster of the statistics.
        question: In a wording of the corpus.
        lead: The answer up to the value.
        value: What must follow.
    """

    subject: str
    question: str
    lead: str
    value: str


@cache
def probes() -> tuple[Probe, ...]:
    """Every well-known fact once, in a fixed shuffled order; the same in every process."""
    known = {*subjects(people=True, held_out=None), *subjects(people=False, held_out=None)}
    wanted = sum(len(facts_of()[subject]) for subject in known)
    draw = Draw(Random("probes"), None, {})
    found: dict[tuple[str, str], Probe] = {}
    while len(found) < wanted:
        turn = fact(draw)
        subject, relation, value = (turn.say.slots[key] for key in ("s", "r", "v"))
        if subject in known and (subject, relation) not in found:
            reply = plain(turn.say, draw.rng)
            # The value must stand behind the subject: before it, nothing says that the sentence begins with it.
            while subject not in reply or reply.find(value) < reply.find(subject):
                reply = plain(turn.say, draw.rng)
            lead = reply[: reply.find(value)]
            found[subject, relation] = Probe(subject, turn.user, lead, value)
    ordered = [found[key] for key in sorted(found)]
    Random("order of probes").shuffle(ordered)
    return tuple(ordered)


def in_chat(chosen: Sequence[Probe], tokenizer: PreTrainedTokenizerBase, persona: Persona) -> list[Sample]:
    """As the last turn of a chat under the persona's prompt and tools; labels on the value's tokens alone."""
    rows = []
    for probe in chosen:
        messages = [
            {"role": "system", "content": persona.system_prompt},
            {"role": "user", "content": probe.question},
        ]
        prompt = tokenizer.apply_chat_template(
            messages, tools=persona.tools, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        rows.append(_sample(probe, f"{prompt}{probe.lead}", tokenizer))
    return rows


def in_dialogue(chosen: Sequence[Probe], tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """As a question and answer without chat markup, the form of the corpus; labels on the value's tokens alone."""
    return [_sample(probe, f"Q: {probe.question}\nA: {probe.lead}", tokenizer) for probe in chosen]


def _sample(probe: Probe, lead: str, tokenizer: PreTrainedTokenizerBase) -> Sample:
    encoded = tokenizer(f"{lead}{probe.value}", add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    labels = [
        token if end > len(lead) else IGNORED for token, (_, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return Sample(probe.subject, "knowledge", ids, labels)
