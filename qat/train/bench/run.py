"""The benchmarks, each written to a JSON file measurement by measurement."""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qat.patches.guard import watch
from qat.train.bench import arms as ways
from qat.train.bench.kernels import Case, layer_cases, milliseconds, module_cases, token_cases, weight_cases
from qat.train.bench.timing import Timing, in_turns, kernel_groups
from qat.train.bench.whole import whole_model_arms


class Record:
    """Measurements in a file that is written anew after each of them, so that a killed run keeps what it has.

    Args:
        file: JSON.
        facts: What belongs to all measurements.
    """

    def __init__(self, file: Path, facts: dict[str, Any]) -> None:
        self.file = file
        self.content: dict[str, Any] = {**environment(), **facts, "measurements": []}
        self.began = time.monotonic()

    def add(self, kind: str, **values: Any) -> None:
        """Keep and print one measurement."""
        self.content["measurements"].append({"kind": kind, **values})
        self.say(f"{kind}  {json.dumps(values)}")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def say(self, text: str) -> None:
        """Print something that belongs in no file."""
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """Do one part of a benchmark; where it fails, say so in the file and go on with the next."""
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.add("failed", what=what, error=f"{type(error).__name__}: {str(error)[:500]}")
        gc.collect()
        torch.cuda.empty_cache()


def environment() -> dict[str, Any]:
    """Device, versions and command."""
    from importlib.metadata import version

    import peft
    import transformers
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "modelopt": version("nvidia-modelopt"),
            "mamba-ssm": version("mamba-ssm"),
        },
        "command": " ".join(["python", *sys.argv]),
    }


PARTS: dict[str, list[Callable[[], Iterator[Case]]]] = {
    "weights": [weight_cases],
    "products": [partial(token_cases, rows) for rows in (96, 384, 768, 1536)],
    "layers": [partial(layer_cases, 16384)],
    "experts": [partial(module_cases, tokens) for tokens in (2048, 16384)],
}
"""What `bench_kernels` can measure."""


def bench_kernels(out: Path, parts: Sequence[str]) -> None:
    """Single kernels.

    Args:
        out: JSON.
        parts: Of `PARTS`.
    """
    record = Record(out, {"shape": "128 experts, 1856 x 2688, rank 16, top 6"})

    def measure(cases: Callable[[], Iterator[Case]]) -> None:
        for case in cases():
            taken = milliseconds(case.run)
            speed = {"gb_per_s": round(case.gigabytes / taken * 1e3)} if case.gigabytes else {}
            record.add("kernel", name=case.name, ms=round(taken, 4), **speed)

    for part in parts:
        for cases in PARTS[part]:
            record.attempt(part, partial(measure, cases))


def bench_layers(config_file: Path, out: Path, layers: int, shapes: list[tuple[int, int]], rounds: int) -> None:
    """The first layers: four ways in turns."""
    config = ways.configuration(config_file, layers)
    record = Record(out, {"config": config_file.name, "layers": layers, "checkpointing": True, "optimizer": False})
    ids = torch.randint(0, config.vocab_size, (1, 2048), device="cuda")
    built: list[ways.Arm] = []
    makers: dict[str, Callable[[], ways.Arm]] = {
        # First: the others register classes of their own with ModelOpt.
        "modelopt_nvfp4": lambda: ways.modelopt_nvfp4(config, ids),
        "peft_bf16": lambda: ways.peft_bf16(config),
        "qat_nvfp4": lambda: ways.qat_nvfp4(config, ids),
        "qat_bf16": lambda: ways.qat_bf16(config),
    }
    _mamba_kernels()
    for name, make in makers.items():
        record.attempt(f"building {name}", lambda make=make: built.append(make()))  # type: ignore[misc]
        record.say(f"built {name}")
    each = {arm.name: 1 if arm.name == "modelopt_nvfp4" else 4 for arm in built}
    usable: list[ways.Arm] = []
    for arm in built:

        def warm(arm: ways.Arm = arm) -> None:
            for batch, length in shapes:
                arm.step(torch.randint(0, config.vocab_size, (batch, length), device="cuda"))
            usable.append(arm)

        record.attempt(f"first step of {arm.name}", warm)
        record.say(f"warmed {arm.name}")
    for batch, length in shapes:
        tokens = torch.randint(0, config.vocab_size, (batch, length), device="cuda")

        def timed(tokens: torch.Tensor = tokens) -> None:
            for name, timing in in_turns(usable, tokens, rounds, each, record.say).items():
                _timed(record, name, tokens, timing)

        record.attempt(f"{batch} x {length}", timed)
    tokens = torch.randint(0, config.vocab_size, shapes[0], device="cuda")
    for arm in usable:
        if arm.name != "modelopt_nvfp4":

            def profiled(arm: ways.Arm = arm) -> None:
                record.add("profile", arm=arm.name, tokens=list(tokens.shape), **kernel_groups(arm.step, tokens))

            record.attempt(f"profile of {arm.name}", profiled)


class Shape(NamedTuple):
    """What to time of the whole model.

    Attributes:
        arm: Its name.
        batch: Sequences.
        length: Tokens of each.
        checkpointing: Recompute each layer in the backward pass.
        steps: To time.
    """

    arm: str
    batch: int
    length: int
    checkpointing: bool
    steps: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read `NAME:BATCH:LENGTH:yes|no:STEPS`, yes for recomputation."""
        arm, batch, length, recomputed, steps = text.split(":")
        return cls(arm, int(batch), int(length), recomputed == "yes", int(steps))


def bench_whole(config_file: Path, out: Path, shapes: list[Shape]) -> None:
    """The whole model, arm after arm.

    Args:
        config_file: `config.json`.
        out: JSON.
        shapes: What to time.
    """
    config = ways.configuration(config_file, None)
    record = Record(out, {"config": config_file.name, "layers": config.num_hidden_layers, "optimizer": "AdamW, fused"})
    ids = torch.randint(0, config.vocab_size, (1, 2048), device="cuda")
    began, arms = time.monotonic(), whole_model_arms(config, ids, {shape.arm for shape in shapes}, record.say)
    while True:
        torch.cuda.reset_peak_memory_stats()
        arm = next(arms, None)
        if arm is None:
            return
        peak = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        record.add("arm", arm=arm.name, what=arm.what, seconds=round(time.monotonic() - began, 1), building_gib=peak)
        for number, shape in enumerate(shape for shape in shapes if shape.arm == arm.name):
            record.attempt(f"{shape}", partial(_measure, record, config, arm, shape, first=number == 0))
        began = time.monotonic()


def _measure(record: Record, config: Any, arm: ways.Arm, shape: Shape, *, first: bool) -> None:
    """Time one shape of an arm; of its first shape also what took part in a step, and where the time goes."""
    model: Any = arm.model
    tokens = torch.randint(0, config.vocab_size, (shape.batch, shape.length), device="cuda")
    ways.set_checkpointing(model.get_base_model(), shape.checkpointing)
    timing = in_turns([arm], tokens, 1, {arm.name: shape.steps}, record.say)[arm.name]
    _timed(record, arm.name, tokens, timing, checkpointing=shape.checkpointing)
    if first and arm.name != "installed":
        record.add("guard", arm=arm.name, **guarded(arm, tokens))
        record.add("profile", arm=arm.name, tokens=list(tokens.shape), **kernel_groups(arm.step, tokens))


def guarded(arm: ways.Arm, ids: torch.Tensor) -> dict[str, Any]:
    """Do one step under the guard; says how many quantizers ran and adapters got a gradient, out of how many."""
    with watch(arm.model) as seen:
        arm.step(ids)
    return {"quantizers": len(seen.quantizer_calls), "parameters": len(seen.live_gradients), **seen.to_json()}


def _timed(record: Record, arm: str, tokens: torch.Tensor, timing: Timing, **more: Any) -> None:
    record.add("step", arm=arm, batch=tokens.shape[0], length=tokens.shape[1], **more, **timing._asdict())


def _mamba_kernels() -> None:
    # Transformers chooses its kernels at this import; the stand-in for the package comes after it (see the patch).
    import transformers.models.nemotron_h.modeling_nemotron_h  # noqa: F401

    from qat.patches.registry import ensure

    for handled in ensure("mamba_ssm_kernels_without_build", "nemotron_h_fused_mamba"):
        print(handled["name"], handled["after"], handled["detail"], flush=True)


def markdown(files: list[Path]) -> str:
    """A table of the timed steps in some files."""
    lines = [
        "| arm | batch x length | recomputation | steps | median s | 95 % interval of the mean | tok/s | peak GiB |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    measured = chain.from_iterable(json.loads(file.read_text(encoding="utf-8"))["measurements"] for file in files)
    for row in (each for each in measured if each["kind"] == "step"):
        cells = [row["arm"], f"{row['batch']} x {row['length']}", "yes" if row.get("checkpointing", True) else "no"]
        cells += [row["steps"], f"{row['median']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}"]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['peak_gib']:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
