"""Time training steps of a recipe on this CPU, BF16 fine-tuning against NVFP4, in turns on the same batches.

python scripts/bench_cpu_step.py --recipe annie_tiny --out docs/benchmarks/train_cpu.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qat.calibration.run import set_ranges
from qat.data.generate import conversations
from qat.data.schema import load_persona
from qat.inputs import base_folder
from qat.quant.modelopt import collect_state, insert_quantizers
from qat.recipe.load import load_recipe
from qat.recipe.schema import DistillBlock, Recipe
from qat.storage import write_json
from qat.train.base import load_base, load_tokenizer
from qat.train.batches import Sample, collate, encode_file, training_order
from qat.train.distill import DistillLoop, Lessons
from qat.train.loop import Loop, Plan
from qat.train.objective import hidden_states
from qat.train.sft import SftLoop, make_trainable, make_tunable
from qat.train.student import quantize_

Step = Callable[[list[int]], object]


def main() -> None:
    """Set up, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="annie_tiny")
    parser.add_argument("--rounds", type=int, default=22, help="timed, each of one step of every arm; four warm up")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    with tempfile.TemporaryDirectory() as folder:
        samples = _samples(recipe, Path(folder))
        order = training_order([len(sample.input_ids) for sample in samples], recipe.train.sft.batch_size, recipe.seed)
        batches = [order[number % len(order)] for number in range(4 + args.rounds)]
        seconds = in_turns(arms(recipe, samples, batches, Path(folder)), batches)
    write_json(args.out, {**_about(), **summary(recipe.name, samples, batches, seconds)})
    print(json.dumps(json.loads(args.out.read_text(encoding="utf-8"))["arms"], indent=1))


def _samples(recipe: Recipe, folder: Path) -> list[Sample]:
    """The recipe's generated conversations as rows."""
    file = folder / "rows.jsonl"
    made = conversations(load_persona(recipe.persona), recipe.data.count or 0, recipe.data.seed)
    file.write_text("".join(f"{json.dumps(one)}\n" for one in made), encoding="utf-8")
    return encode_file(file, load_tokenizer(recipe.base, base_folder(recipe)), recipe.data.max_length).samples


def arms(recipe: Recipe, samples: list[Sample], batches: list[list[int]], folder: Path) -> dict[str, Step]:
    """One optimizer step of each kind, with the recipe's adapters and presets, and the teacher's pass by itself."""
    base, preset, block = base_folder(recipe), recipe.distilled_presets[0], recipe.train.distill
    teacher = load_base(base)
    plan = _plan(recipe, batches)
    tuned, _ = make_tunable(recipe, load_base(base))
    fine_tuning = SftLoop(tuned, samples, samples[:8], recipe.train.sft, plan, folder / "sft")
    apart, _ = make_trainable(recipe, load_base(base), recipe.train.adapter, ends=True)
    as_peft = SftLoop(apart, samples, samples[:8], recipe.train.sft, plan, folder / "peft")
    persona = load_base(base)
    lessons = Lessons(persona, samples, samples[:8], plan)
    inserted = insert_quantizers(calibrated := load_base(base), preset, calibrated.config.to_dict())
    set_ranges(calibrated, recipe.quant.calibration, samples, list(range(recipe.quant.calibration.samples)), preset)
    state = collect_state(calibrated, inserted, kv_cache=recipe.quant.kv_cache, base_sha256="")
    student, _ = make_trainable(recipe, persona, recipe.distill_adapter, ends=False)
    quantize_(student, base, state)

    def distilling(changed: dict[str, Any]) -> Step:
        settings = DistillBlock.model_validate({**block.model_dump(), **changed})
        return _stepper(DistillLoop(student, lessons, settings, plan, folder / "student"), samples, plan)

    def ask(rows: list[int]) -> object:
        batch = collate(samples, rows, plan.tokens)
        with torch.no_grad():
            return hidden_states(teacher, batch.input_ids, batch.targets)

    return {
        "bf16_sft": _stepper(fine_tuning, samples, plan),
        "bf16_sft_with_pefts_forward": _stepper(as_peft, samples, plan),
        "nvfp4_cross_entropy": distilling({"ce_weight": 1.0}),
        "nvfp4_distillation": distilling({"ce_weight": 0.0}),
        "teacher_pass": ask,
    }


def _plan(recipe: Recipe, batches: list[list[int]]) -> Plan:
    count = len(batches)
    return Plan("", batches, "replies", count, count, 0, "eval_loss", recipe.seed, "", gradient_checkpointing=False)


def _stepper(loop: Loop, samples: list[Sample], plan: Plan) -> Step:
    """Forward, backward, clipping, optimizer, and what the loop does after a step."""
    optimizer = loop.create_optimizer()
    trained = [parameter for parameter in loop.model.parameters() if parameter.requires_grad]

    def step(rows: list[int]) -> None:
        batch = collate(samples, rows, plan.tokens)
        loop.model.train()
        (loop.batch_loss(loop.model, batch._asdict()) / int((batch.targets >= 0).sum())).backward()
        torch.nn.utils.clip_grad_norm_(trained, loop.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loop.after_step()

    return step


def in_turns(steps: dict[str, Step], batches: list[list[int]]) -> dict[str, list[float]]:
    """Seconds of each arm on each batch, the first four left out; who goes first changes with every batch."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number, rows in enumerate(batches):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            steps[name](rows)
            taken[name].append(time.perf_counter() - start)
    return {name: seconds[4:] for name, seconds in taken.items()}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median: the order statistics between which it lies, by the binomial distribution."""
    ordered, count = sorted(values), len(values)
    below, rank = 0.0, 0
    while (below := below + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    return ordered[max(0, rank - 1)], ordered[min(count - 1, count - rank)]


def summary(
    recipe: str, samples: list[Sample], batches: list[list[int]], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """Medians with intervals, of seconds and of the ratio to BF16 batch by batch."""
    reference = seconds["bf16_sft"]
    both = [a + b for a, b in zip(seconds["nvfp4_distillation"], seconds["teacher_pass"], strict=True)]
    measured = {**seconds, "nvfp4_distillation_and_teacher_pass": both}
    found = {}
    for name, values in measured.items():
        ratios = [value / base for value, base in zip(values, reference, strict=True)]
        found[name] = {
            "steps": len(values),
            "median_s": round(statistics.median(values), 4),
            "interval_s": [round(value, 4) for value in median_interval(values)],
            "ratio": round(statistics.median(ratios), 3),
            "ratio_interval": [round(value, 3) for value in median_interval(ratios)],
            "seconds": [round(value, 4) for value in values],
        }
    widths = [max(len(samples[row].input_ids) for row in rows) for rows in batches[4:]]
    shape = {"rows": len(batches[0]), "padded_length_median": statistics.median(widths), "lengths": widths}
    return {"recipe": recipe, "batches": shape, "arms": found}


def _about() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines() if platform.system() == "Linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    libraries = ("torch", "transformers", "peft", "nvidia-modelopt")
    return {
        "device": f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads",
        "load": [round(value, 1) for value in os.getloadavg()],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "command": " ".join(["python", *sys.argv]),
    }


if __name__ == "__main__":
    main()
