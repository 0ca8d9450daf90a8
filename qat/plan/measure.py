"""Measuring on a device: seconds of steps, a line through them, peak memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from qat.train.base import training_device

if TYPE_CHECKING:
    from qat.train.loop import Loop

GIB = float(1 << 30)


class Rate(NamedTuple):
    """Seconds of some work as a line: `fixed` each time, `per_token` for each token (padding included)."""

    fixed: float
    per_token: float

    def seconds(self, times: float, tokens: float) -> float:
        """Of so many times with so many tokens in all."""
        return self.fixed * times + self.per_token * tokens


def line(points: Sequence[tuple[int, float]]) -> Rate:
    """Least squares of seconds over tokens; neither part may be negative."""
    count = len(points)
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else mean_y / mean_x
    fixed = mean_y - slope * mean_x
    if slope < 0:
        return Rate(mean_y, 0.0)
    if fixed < 0:
        return Rate(0.0, sum(x * y for x, y in points) / sum(x * x for x, _ in points))
    return Rate(fixed, slope)


class Clock:
    """Seconds of each optimizer step, what follows from it included."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._start = 0.0

    def begin(self) -> None:
        """A step starts."""
        _wait()
        self._start = time.monotonic()

    def end(self) -> None:
        """It has ended."""
        _wait()
        self.steps.append(time.monotonic() - self._start)


def clock_of(loop: Loop) -> Clock:
    """Hang a clock into a loop, behind its own callbacks."""
    from transformers import TrainerCallback

    clock = Clock()

    class Timing(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    loop.add_callback(Timing())
    return clock


def timed(work: Callable[[], object]) -> float:
    """Seconds of some work, on the device too."""
    _wait()
    start = time.monotonic()
    work()
    _wait()
    return time.monotonic() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Begin to measure the GPU's peak memory anew."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    """GiB: the GPU's since `reset_peak`, or on a CPU this process's since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def device_name() -> str:
    """What is measured on."""
    device = training_device()
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {torch.get_num_threads()} threads"
