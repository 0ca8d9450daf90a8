from __future__ import annotations

import random

from qat.data.duplicates import find_leaks, near_pairs, normalise_turn


def slow_pairs(turns: list[str], threshold: float) -> dict[tuple[int, int], float]:
    """Every pair, from the definition of the Jaccard similarity of character 4-grams."""
    grams = []
    for turn in turns:
        padded = " " + turn + " "
        grams.append({padded[i : i + 4] for i in range(len(padded) - 3)} or {padded})
    found = {}
    for first in range(len(turns)):
        for second in range(first + 1, len(turns)):
            similarity = len(grams[first] & grams[second]) / len(grams[first] | grams[second])
            if similarity >= threshold:
                found[first, second] = similarity
    return found


def test_near_pairs_are_those_of_the_definition() -> None:
    rng = random.Random(5)
    words = (
        "weather in mysuru today please tell me the of and ragi mudde recipe ನಮಸ್ಕಾರ remind call amma at seven".split()
    )
    turns = list(dict.fromkeys(" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(250)))
    turns += [turn + "s" for turn in turns[:80]] + ["a", "", "ab"]
    for threshold in (0.5, 0.8, 1.0):
        found = near_pairs(turns, threshold)
        expected = slow_pairs(turns, threshold)
        assert {(pair.first, pair.second): pair.similarity for pair in found} == expected
        assert [pair.similarity for pair in found] == sorted(expected.values(), reverse=True)
    assert len(slow_pairs(turns, 0.8)) > 20


def test_four_thousand_turns_take_seconds() -> None:
    import time

    rng = random.Random(1)
    words = [f"word{number}" for number in range(400)]
    turns = list({" ".join(rng.choices(words, k=8)) for _ in range(4000)})
    started = time.process_time()
    near_pairs(turns)
    assert time.process_time() - started < 8


def test_normalised_turns() -> None:
    assert normalise_turn("  What's the WEATHER,  in Mysuru?! ") == "what s the weather in mysuru"
    assert normalise_turn("ｈｅｌｌｏ") == "hello"
    assert normalise_turn("ನಮಸ್ಕಾರ!") == "ನಮಸ್ಕಾರ"  # vowel signs are marks, and stay


def test_leaks() -> None:
    def record(identity: str, *turns: str) -> dict[str, object]:
        return {"id": identity, "messages": [{"role": "user", "content": turn} for turn in turns]}

    training = [record("t1", "Hi there", "Weather?"), record("t2", "Hi there!")]
    held_out = [record("h1", "hello"), record("h2", "Good day", "hi THERE"), record("h3", "weather")]
    assert find_leaks(training, held_out) == [("t1", "h2", "hi THERE"), ("t1", "h3", "weather")]
    assert find_leaks(training, held_out[:1]) == []
