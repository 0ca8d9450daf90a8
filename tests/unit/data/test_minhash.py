from __future__ import annotations

import random
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from qat.data.audit import texts as audit_texts
from qat.data.audit.texts import TextStore, repeats
from qat.data.duplicates import Families, NearIndex, grams, jaccard, near_pairs
from qat.data.minhash import PERMUTATIONS, near_families, signatures

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


def families_of(count: int, pairs: Iterable[tuple[int, int]]) -> set[frozenset[int]]:
    """Connected components by flooding, those of one text included."""
    neighbours: dict[int, set[int]] = {place: set() for place in range(count)}
    for first, second in pairs:
        neighbours[first].add(second)
        neighbours[second].add(first)
    found = set()
    for place in range(count):
        reached, edge = {place}, {place}
        while edge:
            edge = {other for each in edge for other in neighbours[each]} - reached
            reached |= edge
        found.add(frozenset(reached))
    return found


def same_roots(roots: Any) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(roots == root).tolist()) for root in set(roots.tolist())}


def test_families_are_connected_components() -> None:
    rng = random.Random(2)
    for count in (1, 2, 50):
        pairs = [(rng.randrange(count), rng.randrange(count)) for _ in range(count // 2)]
        families = Families(count)
        for pair in pairs:
            families.join(*pair)
        assert same_roots(families.roots()) == families_of(count, pairs)
        assert all(families.together(*pair) for pair in pairs)


def test_near_families_are_those_of_all_pairs() -> None:
    texts = made(800, 3)
    texts += [text + "o now" for text in texts[-150:]]  # families of three, some held together by the middle one alone
    exact = families_of(len(texts), [pair[:2] for pair in near_pairs(texts)])
    families, pairs = near_families(signatures(texts), lambda position: texts[position])
    found = same_roots(families.roots())
    assert all(any(family <= whole for whole in exact) for family in found)  # nothing is linked that is not near
    assert max(map(len, exact)) > 2 and len(found - exact) <= 0.02 * len(exact)
    assert all(pair.similarity == jaccard(grams(texts[pair[0]]), grams(texts[pair[1]])) for pair in pairs)
    assert len(pairs) == len(texts) - len(found)  # each pair has linked two families


def test_the_store_answers_alike_by_both_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = made(300, 5)
    every = [*texts, texts[7], texts[7], "ನಮಸ್ಕಾರ"]
    components = families_of(len(texts), [pair[:2] for pair in near_pairs(texts)])
    near = sum(len(family) for family in components if len(family) > 1)
    sizes = sorted((len(family) + 2 * (7 in family) for family in components), reverse=True)
    for limit, bytes_, exact in ((10**6, 1 << 20, True), (10, 1 << 20, False), (10**6, 100, False)):
        monkeypatch.setattr(audit_texts, "EXACT_BYTES", bytes_)
        with TextStore(limit) as store:
            store.add(every)
            numbers = store.numbers()
            assert store.text(7) == texts[7] and store.text(len(texts) + 2) == "ನಮಸ್ಕಾರ"
        assert numbers[:2] == (len(texts) + 3, len(texts) + 1) and numbers.exact == exact
        assert abs(numbers.near - near) <= (0 if exact else 0.02 * near)
        assert abs(numbers.again - (len(every) - len(components) - 1)) <= (0 if exact else 0.02 * near)
        if exact:
            assert [count for count, _ in numbers.families] == sizes[:5]
            best = max(pair.similarity for pair in near_pairs(texts))
            assert numbers.near_examples[0].similarity == round(best, 3)


@pytest.mark.parametrize("count", [2500, 12_000])
def test_texts_that_are_all_alike_do_not_take_long(count: int) -> None:
    texts = [
        f"it is {number} degrees in the old town of malvek by the river and the sky is clear" for number in range(count)
    ]
    started = time.process_time()
    with TextStore() as store:
        store.add(texts)
        numbers = store.numbers()
    assert numbers.families[0] == (count, texts[0]) and numbers.again == count - 1
    assert time.process_time() - started < 8


def test_long_texts_are_shown_by_their_beginning() -> None:
    with TextStore() as store:
        store.add(["word " * 1000] * 3)
        assert store.numbers().families == [(3, ("word " * 1000)[:200] + "…")]


def test_an_empty_store() -> None:
    with TextStore() as store:
        assert store.numbers()[:4] == (0, 0, 0, 0)


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
