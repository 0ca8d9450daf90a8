"""The choice of formats against trying every one."""

from __future__ import annotations

import itertools
import random

import pytest

from qat.calibration.mixed import Option, choose
from qat.errors import UserError

Groups = dict[str, list[Option]]


def random_groups(seed: int, count: int, sizes: list[int]) -> Groups:
    """Groups of a few sizes, as a network's layers are; sometimes a smaller format costs less."""
    draw = random.Random(seed)
    groups: Groups = {}
    for number in range(count):
        size = draw.choice(sizes)
        options = [Option("bf16", 2 * size, 0.0), Option("nvfp4", size * 9 // 16, draw.random() / 10)]
        if draw.random() < 0.5:
            options.append(Option("fp8", size + 8, draw.random() / 20))
        groups[f"{number}.part"] = options
    return groups


def try_all(groups: Groups, budget: int, fixed: int) -> float:
    """The smallest sum of divergences within the budget."""
    best = float("inf")
    for picked in itertools.product(*groups.values()):
        if fixed + sum(option.bytes for option in picked) <= budget:
            best = min(best, sum(option.kl for option in picked))
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
def test_against_trying_all(seed: int, share: float) -> None:
    groups = random_groups(seed, 7, [160, 160, 1600, 480] if seed % 2 else list(range(160, 2000, 16)))
    fixed = 1000
    largest = fixed + sum(max(option.bytes for option in options) for options in groups.values())
    smallest = fixed + sum(min(option.bytes for option in options) for options in groups.values())
    budget = max(int(largest * share), smallest)
    choice = choose(groups, budget, fixed)
    picked = {name: next(o for o in groups[name] if o.format == kind) for name, kind in choice.formats.items()}
    assert list(choice.formats) == list(groups)
    assert choice.bytes == fixed + sum(option.bytes for option in picked.values()) <= budget
    assert choice.kl == pytest.approx(sum(option.kl for option in picked.values()))
    assert choice.kl == pytest.approx(try_all(groups, budget, fixed))
    assert choice.exact


def test_by_hand() -> None:
    """The cheap layer is worth eight bytes more, the dear one is not."""
    groups = {
        "a": [Option("bf16", 32, 0.0), Option("nvfp4", 9, 0.5)],
        "b": [Option("bf16", 64, 0.0), Option("nvfp4", 18, 0.6)],
    }
    assert choose(groups, 96).formats == {"a": "bf16", "b": "bf16"}
    assert choose(groups, 95).formats == {"a": "nvfp4", "b": "bf16"}
    assert choose(groups, 72).formats == {"a": "bf16", "b": "nvfp4"}
    assert choose(groups, 49).formats == {"a": "nvfp4", "b": "nvfp4"}
    with pytest.raises(UserError, match="below what the smallest formats need"):
        choose(groups, 26)


def test_a_whole_network_is_exact() -> None:
    """The shape of Nano: 23 Mamba layers, 23 of experts, 6 of attention, all of one size each."""
    draw = random.Random(3)
    groups: Groups = {}
    for number, (part, size) in enumerate(
        [("in", 27_700_000), ("out", 11_000_000)] * 23
        + [("experts", 1_277_000_000), ("shared", 20_000_000)] * 23
        + [("attention", 23_000_000)] * 6
    ):
        options = [Option("bf16", 2 * size, 0.0), Option("nvfp4", size * 9 // 16, draw.random() / 100)]
        groups[f"{number}.{part}"] = options
    choice = choose(groups, 22_000_000_000)
    assert choice.exact and choice.bytes <= 22_000_000_000
    # No swap of one group for another of the same size is better.
    for part in ("in", "out", "experts", "shared", "attention"):
        names = [name for name in groups if name.endswith(f".{part}")]
        kept = [groups[name][1].kl for name in names if choice.formats[name] == "bf16"]
        packed = [groups[name][1].kl for name in names if choice.formats[name] == "nvfp4"]
        assert not kept or not packed or min(kept) >= max(packed)


def test_too_many_sizes_are_thinned_and_said() -> None:
    groups = random_groups(1, 24, list(range(1000, 9000, 7)))
    budget = sum(options[0].bytes for options in groups.values()) // 2
    exact, thinned = choose(groups, budget), choose(groups, budget, limit=50)
    assert exact.exact and not thinned.exact
    assert thinned.bytes <= budget and exact.kl <= thinned.kl <= 1.5 * exact.kl + 0.01
