"""Timing of steps on a GPU: taken in turns, each by a pair of events, with an interval of the mean."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.train.bench.arms import Arm


class Timing(NamedTuple):
    """Seconds of one arm's steps.

    Attributes:
        steps: How many were timed.
        median: Of the steps.
        mean: Of the steps.
        low: Of the 95 % interval of the mean (Student's t).
        high: Of the same.
        tokens_per_second: Tokens of a batch over the median.
        peak_gib: Largest memory that was allocated during the steps, whatever else stands on the GPU included.
        above_rest_gib: The same over what was allocated before them.
    """

    steps: int
    median: float
    mean: float
    low: float
    high: float
    tokens_per_second: float
    peak_gib: float
    above_rest_gib: float


def summarize(seconds: Sequence[float], tokens: int, peak_bytes: int, rest_bytes: int) -> Timing:
    """Condense the steps of one arm.

    Args:
        seconds: One number a step, two at least.
        tokens: Of a batch.
        peak_bytes: Of allocated GPU memory.
        rest_bytes: The same before the steps.
    """
    from scipy.stats import t

    mean, median = statistics.fmean(seconds), statistics.median(seconds)
    half = float(t.ppf(0.975, len(seconds) - 1)) * statistics.stdev(seconds) / len(seconds) ** 0.5
    return Timing(
        steps=len(seconds),
        median=round(median, 5),
        mean=round(mean, 5),
        low=round(mean - half, 5),
        high=round(mean + half, 5),
        tokens_per_second=round(tokens / median, 1),
        peak_gib=round(peak_bytes / 2**30, 2),
        above_rest_gib=round((peak_bytes - rest_bytes) / 2**30, 2),
    )


def seconds_of(step: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    """Time one step between two events; the queue is empty before and after."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step(ids)
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def in_turns(
    arms: Sequence[Arm], ids: Tensor, rounds: int, each: Mapping[str, int], say: Callable[[str], None]
) -> dict[str, Timing]:
    """Time several arms in turns, after one step of each that does not count.

    Args:
        arms: The arms.
        ids: Tokens (batch, length), the same for all.
        rounds: How often all are gone through.
        each: Steps of an arm in one round, by its name.
        say: Takes how long each step took, in words.
    """
    taken: dict[str, list[float]] = {arm.name: [] for arm in arms}
    peaks = dict.fromkeys(taken, 0)
    for arm in arms:
        say(f"{arm.name}: first step {seconds_of(arm.step, ids):.3f} s")
    rest = torch.cuda.memory_allocated()
    for _ in range(rounds):
        for arm in arms:
            torch.cuda.reset_peak_memory_stats()
            for _ in range(each[arm.name]):
                taken[arm.name].append(seconds_of(arm.step, ids))
                say(f"{arm.name}: {taken[arm.name][-1]:.3f} s")
            peaks[arm.name] = max(peaks[arm.name], torch.cuda.max_memory_allocated())
    return {name: summarize(seconds, ids.numel(), peaks[name], rest) for name, seconds in taken.items()}


# Kernel names -> what they do, first match wins.
_GROUPS = (
    ("matrix products, grouped", r"GroupProblem|GemmGrouped"),
    ("unpacking", r"_unpack_kernel"),
    ("NVFP4 and effective weights", r"_weight_kernel|_effective_kernel|fp4_fake_quant"),
    ("NVFP4 of activations, relu2", r"_activation_kernel|_relu2_backward"),
    ("routing: gather, combine", r"_sum_kernel|_spread_kernel|index|gather|scatter|sort|radix|searchsorted"),
    ("norms", r"_norm_kernel|_gated_kernel|layer_norm"),
    ("convolution", r"_convolution_kernel|conv_depthwise|cudnn.*conv|conv2d|dgrad2d"),
    ("Mamba scan", r"chunk|state_passing|_bmm_"),
    ("attention", r"flash|fmha|attention"),
    ("softmax and loss", r"softmax|nll|SoftMax"),
    ("matrix products", r"gemm|nvjet|cutlass|sm90_|sm80_|ampere"),
    ("copies", r"[Mm]emcpy|[Mm]emset|copy_kernel|CatArray"),
)


def kernel_groups(step: Callable[[Tensor], Tensor], ids: Tensor) -> dict[str, Any]:
    """Profile one step: milliseconds of GPU time and launches by group of kernels, and the longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        step(ids)
        torch.cuda.synchronize()
    groups: dict[str, float] = {}
    launches: dict[str, int] = {}
    longest: list[tuple[float, int, str]] = []
    for event in watched.key_averages():
        milliseconds = event.self_device_time_total / 1e3
        group = next((name for name, pattern in _GROUPS if re.search(pattern, event.key)), "other, elementwise")
        groups[group] = groups.get(group, 0.0) + milliseconds
        launches[group] = launches.get(group, 0) + event.count
        longest.append((round(milliseconds, 3), event.count, event.key[:110]))
    ordered = sorted(groups.items(), key=lambda item: -item[1])
    return {
        "total_ms": round(sum(groups.values()), 2),
        "groups_ms": {name: round(value, 2) for name, value in ordered},
        "launches": {name: launches[name] for name, _ in ordered},
        "longest": sorted(longest, reverse=True)[:25],
    }
