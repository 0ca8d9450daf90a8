"""Checks of time read what was measured, and say so where nothing was."""

from __future__ import annotations

import pytest

from qat.behavior.checks import CheckError, Reply, bind


@pytest.mark.parametrize("name", ["max_latency", "max_first_token"])
def test_within_and_beyond(name: str) -> None:
    check = bind(name, {"seconds": 0.5})
    for measured, passes in ((0.0, True), (0.49, True), (0.5, True), (0.501, False), (30.0, False)):
        # The other clock is far off: each check reads its own.
        times = {"latency_s": 99.0, "first_token_s": 99.0} | {
            "latency_s" if name == "max_latency" else "first_token_s": measured
        }
        assert check(Reply([{"content": "a"}], **times)).passed is passes  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["max_latency", "max_first_token"])
def test_a_time_that_nobody_measured_is_an_error(name: str) -> None:
    with pytest.raises(CheckError, match="not measured"):
        bind(name, {"seconds": 1})(Reply([{"content": "a"}]))


@pytest.mark.parametrize("seconds", [0, -1, "fast", None])
def test_a_limit_is_a_positive_time(seconds: object) -> None:
    with pytest.raises(ValueError, match="check max_latency"):
        bind("max_latency", {"seconds": seconds})
