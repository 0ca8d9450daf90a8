from __future__ import annotations

import random

import numpy as np
import pytest

from qat.data.audit import turns as audit_turns
from qat.data.audit.turns import TurnStore, repeats
from qat.data.duplicates import NearIndex, grams, jaccard, near_pairs
from qat.data.minhash import PERMUTATIONS, near_twins, signatures

WORDS = "weather in mysuru today please tell me the of and ragi mudde recipe ನಮಸ್ಕಾರ remind call amma at seven".split()


def made(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    turns = list(dict.fromkeys(" ".join(rng.choices(WORDS, k=rng.randint(4, 10))) for _ in range(count)))
    return [*turns, *(turn + " s" for turn in turns[: count // 4])]


def test_signatures_estimate_the_similarity() -> None:
    pairs = [("a b c d e f g h", "a b c d e f g i"), ("remind me to call amma", "remind me to call appa")]
    for first, second in pairs:
        rows = signatures([first, second])
        assert rows.shape == (2, PERMUTATIONS) and rows.dtype == np.uint32
        estimate = float((rows[0] == rows[1]).mean())
        assert estimate == pytest.approx(jaccard(grams(first), grams(second)), abs=0.17)  # four standard deviations


def test_near_twins_are_those_of_all_pairs() -> None:
    turns = made(800, 3)
    exact = {position for pair in near_pairs(turns) for position in pair[:2]}
    near, pairs = near_twins(signatures(turns), lambda position: turns[position])
    found = set(np.flatnonzero(near).tolist())
    assert found <= exact  # each is confirmed
    assert len(found) >= 0.98 * len(exact) > 100
    assert all(pair.similarity == jaccard(grams(turns[pair[0]]), grams(turns[pair[1]])) for pair in pairs)


def test_the_store_answers_alike_by_both_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = made(300, 5)
    answers = []
    for limit in (len(turns) + 1, 10):
        monkeypatch.setattr(audit_turns, "EXACT_UPTO", limit)
        with TurnStore() as store:
            store.add(turns)
            store.add([turns[7], turns[7], "ನಮಸ್ಕಾರ"])
            answers.append(store.numbers())
            assert store.text(7) == turns[7] and store.text(len(turns) + 2) == "ನಮಸ್ಕಾರ"
    exact, estimated = answers
    assert exact[:2] == estimated[:2] == (len(turns) + 3, len(turns) + 1)
    assert exact.frequent[0] == estimated.frequent[0] == (turns[7], 3)
    assert exact.exact and not estimated.exact and 0.98 * exact.near <= estimated.near <= exact.near


def test_an_empty_store() -> None:
    with TurnStore() as store:
        assert store.numbers()[:3] == (0, 0, 0)


def test_repeats() -> None:
    from array import array

    assert repeats(array("Q", [5, 7, 5, 9, 7, 5])) == [(2, 0), (4, 1), (5, 0)]
    assert repeats(array("Q", [])) == []


def test_the_index_finds_the_most_similar_turn() -> None:
    known, probes = made(300, 1), made(300, 2)
    index = NearIndex(known)
    hits = 0
    for probe in [*probes, *known[:20], *(turn + " now" for turn in known[:40])]:
        best = max(jaccard(grams(probe), grams(turn)) for turn in known)
        found = index.nearest(probe)
        assert (found is not None) == (best >= 0.8)
        if found is not None:
            hits += 1
            assert found[1] == best == jaccard(grams(probe), grams(known[found[0]]))
    assert hits > 20
