"""One process of a benchmark on several GPUs: arms, their steps, and where a step's time goes.

Every GPU gets a batch of its own of the same size (weak scaling), and a step is the loop's: `accelerator.prepare`, the
losses called inside the wrapper's forward, the sum over all targets, clipping, AdamW, and in distillation the growth of
weight ranges. Weights are random, in the true shape.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.patches.guard import watch
from qat.storage import write_json
from qat.train import parallel
from qat.train.base import training_device
from qat.train.bench import arms as ways
from qat.train.bench.run import Shape
from qat.train.bench.timing import summarize
from qat.train.launch import end_with_parent

_PATIENCE = timedelta(seconds=60)
"""After which NCCL ends a process whose neighbour does not come."""
_TARGETS: dict[str, tuple[str | list[str], list[str]]] = {
    "attention": (ways.ATTENTION, []),
    "experts": ([], ways.EXPERTS),
    "distillation": ([], ways.EXPERTS),
}


class Measurements:
    """Measurements in a file that several processes write one after the other; the file is whole at every moment.

    Args:
        file: JSON.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def begin(self, facts: dict[str, Any]) -> None:
        """Write what belongs to all measurements; those that the file holds already stay."""
        earlier = json.loads(self.file.read_text(encoding="utf-8"))["measurements"] if self.file.is_file() else []
        write_json(self.file, {**facts, "measurements": earlier})

    def add(self, kind: str, **values: Any) -> None:
        """Keep and print one measurement."""
        content = json.loads(self.file.read_text(encoding="utf-8"))
        content["measurements"].append({"kind": kind, **values})
        write_json(self.file, content)
        print(f"{kind}  {json.dumps(values)}", flush=True)


class Arm(NamedTuple):
    """One way of training, wrapped for the processes at hand.

    Attributes:
        model: Prepared by accelerate; for DDP what it wraps.
        work: Takes token ids (batch, length): forward and backward; returns this process's loss.
        finish: Clip, step, forget the gradients, and let weight ranges follow.
    """

    model: Any
    work: Callable[[Tensor], Tensor]
    finish: Callable[[], None]

    def step(self, ids: Tensor) -> Tensor:
        """One whole step."""
        loss = self.work(ids)
        self.finish()
        return loss


def build(config: Any, shape: Shape, accelerator: Any) -> Arm:
    """Make a network with its adapter, quantizers and optimizer, and hand it to accelerate.

    Args:
        config: Of the network.
        shape: Names the arm; says whether layers are computed again in the backward.
        accelerator: Of this process.
    """
    from qat.train.adapters import use_effective_weights_
    from qat.train.base import use_kernels_
    from qat.train.ranges import WeightRanges

    torch.manual_seed(0)  # the same weights everywhere, as if loaded
    network = ways.network(config, checkpointing=shape.checkpointing)
    use_kernels_(network)
    model = ways.with_lora(network, *_TARGETS[shape.arm])
    ranges = None
    if shape.arm == "distillation":
        ways.quantize(model, torch.randint(0, config.vocab_size, (1, shape.length), device=training_device()))
        ranges = WeightRanges(model)
    else:
        use_effective_weights_(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    parallel.choose_layers(accelerator, model)
    wrapped, optimizer = accelerator.prepare(model, optimizer)

    def finish() -> None:
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ranges is not None:
            ranges.grow_()

    return Arm(model, _work(accelerator, wrapped, model, distils=ranges is not None), finish)


def _work(accelerator: Any, wrapped: Any, model: Any, *, distils: bool) -> Callable[[Tensor], Tensor]:
    from qat.quant.modelopt import quantizers_off
    from qat.train.objective import cross_entropy_sum, hidden_states, kl_sum, output_weight

    weight = output_weight(model)
    several = parallel.ranks() > 1
    warm = False

    def inside(function: Callable[[], Tensor]) -> Tensor:
        return parallel.call_inside(wrapped, model, function) if several else function()

    def teacher(ids: Tensor) -> Tensor:
        with torch.no_grad(), quantizers_off(model), model.disable_adapter():
            states = partial(hidden_states, model, ids, ids)
            return inside(states) if parallel.is_sharded(model) else states()

    def loss_sum(ids: Tensor, answer: Tensor | None) -> Tensor:
        targets = ids.roll(-1, dims=1)
        student = hidden_states(model, ids, targets)
        if answer is None:
            return cross_entropy_sum(student, weight, targets.reshape(-1))
        return kl_sum(student, answer, weight, 1.0)

    def work(ids: Tensor) -> Tensor:
        nonlocal warm
        answer = None
        if distils:
            # PEFT takes requires_grad from what it disables, and FSDP2 remembers it from its first gathering.
            answer = teacher(ids) if warm else torch.zeros(ids.numel(), weight.shape[1], device=ids.device).to(weight)
            warm = True
        targets = parallel.summed(torch.tensor(ids.numel(), device=ids.device))
        loss = inside(lambda: loss_sum(ids, answer)) * parallel.ranks() / targets
        accelerator.backward(loss)
        return loss.detach()

    return work


def measure(shape: Shape, arm: Arm, config: Any) -> dict[str, dict[str, Any]]:
    """Time an arm's steps; all processes must call it.

    Returns:
        What belongs to the kinds `step`, `guard` and, on a GPU, `profile`.
    """
    torch.manual_seed(1 + parallel.rank())
    ids = torch.randint(0, config.vocab_size, (shape.batch, shape.length), device=training_device())
    first = [round(_seconds(arm.step, ids), 2) for _ in range(2)]
    rest = _allocated()
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    # A step is over when the last process is through it.
    own = [_seconds(arm.step, ids) for _ in range(shape.steps)]
    seconds = [max(each) for each in zip(*parallel.gathered(own), strict=True)]
    peaks = parallel.gathered(torch.cuda.max_memory_allocated() if ids.is_cuda else 0)
    timing = summarize(seconds, ids.numel() * parallel.ranks(), max(peaks), rest)
    found: dict[str, dict[str, Any]] = {
        "step": {
            **timing._asdict(),
            "peak_gib_by_rank": [round(peak / 2**30, 2) for peak in peaks],
            "first_steps": first,
        }
    }
    with watch(arm.model) as seen:
        arm.work(ids)
    if parallel.is_sharded(arm.model):
        parallel.count_sharded_gradients(seen, arm.model)
    found["guard"] = {
        "quantizers": len(seen.quantizer_calls),
        "parameters": len(seen.live_gradients),
        **seen.to_json(),
    }
    arm.finish()
    if ids.is_cuda:
        found["profile"] = _profile(arm.step, ids)
    return found


def _seconds(step: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    _wait()
    began = time.perf_counter()
    step(ids)
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


class Span(NamedTuple):
    """Work on a GPU.

    Attributes:
        name: Of the kernel or copy.
        begin: Microseconds.
        end: Microseconds.
    """

    name: str
    begin: float
    end: float


def occupancy(spans: Iterable[Span]) -> dict[str, float]:
    """What a GPU does with a step's time, in ms.

    Returns:
        span_ms: From the first kernel's begin to the last one's end.
        computing_ms: Some kernel other than NCCL's runs.
        communicating_ms: One of NCCL's runs, which includes waiting for the other process.
        exposed_ms: NCCL's runs and nothing else does.
        idle_ms: Nothing runs.
    """
    inside: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for span in spans:
        inside[bool(re.search(r"nccl", span.name, re.IGNORECASE))].append((span.begin, span.end))
    both = inside[False] + inside[True]
    if not both:
        return {}
    whole = max(end for _, end in both) - min(begin for begin, _ in both)
    computing, communicating, busy = _covered(inside[False]), _covered(inside[True]), _covered(both)
    parts = {
        "span_ms": whole,
        "computing_ms": computing,
        "communicating_ms": communicating,
        "exposed_ms": busy - computing,
        "idle_ms": whole - busy,
    }
    return {name: round(value / 1e3, 2) for name, value in parts.items()}


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Length of a union of intervals."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _profile(step: Callable[[Tensor], Tensor], ids: Tensor) -> dict[str, Any]:
    """Profile one step of this process: its GPU's time, and NCCL's kernels."""
    from torch.profiler import ProfilerActivity, profile

    _wait()
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        step(ids)
        _wait()
    # Ranges that torch and FSDP2 mark around kernels are no work of their own.
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in watched.events() or ()
        if event.device_type.name == "CUDA"
        and not getattr(event, "is_user_annotation", False)
        and not re.match(r"FSDP::|nccl:|c10d::|Distributed|Optimizer|ProfilerStep", event.name)
    ]
    kernels: dict[str, list[float]] = {}
    for span in spans:
        if "nccl" in span.name.lower():
            kernels.setdefault(span.name[:60], []).append(span.end - span.begin)
    named = {name: {"calls": len(taken), "ms": round(sum(taken) / 1e3, 2)} for name, taken in kernels.items()}
    return {**occupancy(spans), "nccl": named}


def _processes_part(job: dict[str, Any]) -> None:
    """What each process does: arm after arm; the first one writes."""
    import transformers.models.nemotron_h.modeling_nemotron_h  # noqa: F401  before its kernels are stood in for
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedDataParallelKwargs

    from qat.patches.registry import ensure

    config = ways.configuration(Path(job["config"]), job["layers"])
    if torch.cuda.is_available():
        ensure("mamba_ssm_kernels_without_build", "nemotron_h_fused_mamba")
    PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    every_factor = DistributedDataParallelKwargs(find_unused_parameters=False)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[every_factor])
    measured = Measurements(Path(job["out"]))
    for shape in map(Shape.parse, job["shapes"]):
        facts = {"layers": job["layers"], "gpus": parallel.ranks(), "mode": job["mode"], **shape._asdict()}
        del facts["steps"]
        facts["before_gib"] = round(_allocated() / 2**30, 2)
        found = run_arm(config, shape, accelerator)
        if parallel.rank() == 0:
            for kind, values in found.items():
                measured.add(kind, **facts, **values)


def run_arm(config: Any, shape: Shape, accelerator: Any) -> dict[str, dict[str, Any]]:
    """Build and measure one arm, and free its memory before the next one's is taken; all processes must call it.

    Args:
        config: Of the network.
        shape: The arm.
        accelerator: Of this process.

    Returns:
        What `measure` returns, each with the seconds of building; or what went wrong, as `failed`.
    """
    try:
        began = time.monotonic()
        arm = build(config, shape, accelerator)
        built = round(time.monotonic() - began, 1)
        return {kind: {"building_s": built, **values} for kind, values in measure(shape, arm, config).items()}
    except Exception as error:
        traceback.print_exc()
        return {"failed": {"error": f"{type(error).__name__}: {str(error)[:500]}"}}
    finally:
        arm = None  # type: ignore[assignment]
        accelerator.free_memory()
        if (plugin := getattr(accelerator.state, "fsdp_plugin", None)) is not None:
            plugin.ignored_modules = None  # through which the state of all processes holds the network
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main(job: Path) -> None:
    """One process of a measurement, as the launcher starts it."""
    end_with_parent(signal.SIGKILL)
    content = json.loads(job.read_text(encoding="utf-8"))
    # Never by itself: the dump reads the main thread's frames while it goes on, which ended a sound run by SIGSEGV.
    if seconds := content.get("stacks"):
        faulthandler.dump_traceback_later(seconds, repeat=True)
    if "RANK" in os.environ:
        os.dup2(1, 2) if os.environ["RANK"] == "0" else os.dup2(2, 1)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        parallel.take_part(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    _processes_part(content)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
