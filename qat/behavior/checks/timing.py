"""Checks of time: a voice that answers late has failed, whatever it says.

They read what the runner measured. Times depend on the machine and its load: a suite with these checks compares arms
only where both were served alike.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qat.behavior.checks.base import PASSED, CheckError, CheckResult, Params, Reply, check, failed


class Seconds(Params):
    """The longest time allowed."""

    seconds: Annotated[float, Field(gt=0)]


@check("max_latency", Seconds)
def max_latency(reply: Reply, params: Seconds) -> CheckResult:
    """The whole reply, tool rounds included, came within `seconds`.

    Raises:
        CheckError: The time was not measured.
    """
    return _within(reply.latency_s, params.seconds, "latency")


@check("max_first_token", Seconds)
def max_first_token(reply: Reply, params: Seconds) -> CheckResult:
    """The first token of the first answer came within `seconds`.

    Raises:
        CheckError: The time was not measured: the answers were not streamed.
    """
    return _within(reply.first_token_s, params.seconds, "time to first token")


def _within(measured: float | None, seconds: float, what: str) -> CheckResult:
    if measured is None:
        raise CheckError(f"the {what} was not measured")
    return PASSED if measured <= seconds else failed(f"{what} {measured:.3f} s, at most {seconds:g} s")
