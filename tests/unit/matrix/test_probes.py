"""Knowledge probes: every fact once, the value asked for and nothing else."""

from __future__ import annotations

import math

import numpy as np
import torch

from qat.data.generate.world import facts
from qat.data.render import IGNORED
from qat.data.schema import load_persona
from qat.matrix.measure import known, nats
from qat.matrix.probes import in_chat, in_dialogue, probes
from qat.recipe.schema import BaseBlock
from qat.train.base import load_tokenizer, resolve_base
from qat.train.batches import Sample
from tests.tiny_models import nemotron_h_tiny


def test_every_well_known_fact_is_asked_once_and_answered_with_its_value() -> None:
    found = probes()
    known_facts = {(fact.subject, fact.value) for fact in facts()}
    assert len(found) == 2400
    assert len({(probe.subject, probe.question) for probe in found}) == 2400
    assert all((probe.subject, probe.value) in known_facts for probe in found)
    assert all(probe.subject in probe.question and probe.subject in probe.lead for probe in found)


def test_labels_are_the_tokens_of_the_value() -> None:
    block = BaseBlock()
    tokenizer = load_tokenizer(block, resolve_base(block))
    chosen = probes()[:40]
    chat, plain = in_chat(chosen, tokenizer, load_persona("annie_tiny")), in_dialogue(chosen, tokenizer)
    for probe, *samples in zip(chosen, chat, plain, strict=True):
        for sample in samples:
            asked = [token for token, label in zip(sample.input_ids, sample.labels, strict=True) if label != IGNORED]
            assert tokenizer.decode(asked).strip() == probe.value
            assert tokenizer.decode(sample.input_ids).endswith(f"{probe.lead}{probe.value}")
    assert "<|im_start|>" not in tokenizer.decode(plain[0].input_ids)


def test_what_is_known_and_how_surely_follow_from_the_logits() -> None:
    model = nemotron_h_tiny(dtype=torch.float32)
    ids = torch.randint(3, 500, (5, 30), generator=torch.Generator().manual_seed(1))
    ids[3, 20:] = 0
    logits = model(input_ids=ids).logits.detach().float()
    best = logits.argmax(dim=-1)
    rows = []
    for number in range(5):
        row = ids[number].tolist()
        labels = [IGNORED] * 28 + row[28:]
        if number % 2:  # the two last tokens are what the model says: but they change what it says next
            row[28] = labels[28] = int(best[number, 27])
        rows.append(Sample(str(number), "knowledge", row, labels))
    expected = []
    for sample in rows:
        said = model(input_ids=torch.tensor([sample.input_ids])).logits[0].argmax(dim=-1)
        expected.append([int(t) for t in said[27:29]] == sample.input_ids[28:])
    assert known(model, rows) == expected
    second = [sample._replace(labels=[IGNORED] * 28 + [sample.input_ids[28], IGNORED]) for sample in rows]
    assert known(model, second) == [False, True, False, True, False]
    log_p = logits.log_softmax(dim=-1)
    slow = [
        -sum(float(log_p[row, place, ids[row, place + 1]]) for place in range(29) if ids[row, place + 1] != 0)
        for row in range(5)
    ]
    found = nats(model, ids.numpy().astype(np.uint16))
    assert all(math.isclose(one, other, rel_tol=1e-3) for one, other in zip(found, slow, strict=True))
