"""A training stage in this process, or in one process for each GPU, started by accelerate's own launcher.

The command that holds the run's lock stays outside: it writes what is to be done into a file, starts
`accelerate launch … -m qat.train.launch <that file>`, and reads what the first process reports. The other processes
work in folders of their own below the stage's, which are thrown away.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.errors import ExitCode, UserError
from qat.patches.registry import handled
from qat.storage import write_json

if TYPE_CHECKING:
    from qat.recipe.schema import Recipe

STAGES = {"sft": ("qat.train.sft", "train_sft"), "distill": ("qat.train.distill", "distill")}
"""Stage -> module and function: (recipe, paths…, folder of the stage) -> report with `to_json`."""

REPLICATED = ("--multi_gpu",)
"""Every process keeps the whole base, and DDP averages the factors' gradients. Also on CPUs, over gloo."""

SHARDED = (
    *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_reshard_after_forward", "true", "--fsdp_cpu_ram_efficient_loading", "false"),
)
"""Every process keeps a part of each layer: FSDP2; `qat.train.parallel.choose_layers` says of which layers."""

PROGRAM = "qat.train.launch"
"""What each process runs."""

_METHODS = {"--multi_gpu": REPLICATED, "--use_fsdp": SHARDED}
_QUANT_STATE = 2  # among the paths of distillation
_PLAIN = ("--mixed_precision", "no", "--dynamo_backend", "no")
_FOLDER = "processes"
_STOP_SECONDS = 40


class Processes(NamedTuple):
    """How many processes a training has.

    Attributes:
        gpus: On all machines together; 1 is this process.
        flags: Further flags for `accelerate launch`, such as those of several machines; `--multi_gpu` or `--use_fsdp`
            says how the base is kept, which is otherwise chosen by what fits.
    """

    gpus: int = 1
    flags: tuple[str, ...] = ()

    @property
    def machines(self) -> int:
        """How many machines the flags name."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--num_machines", type=int, default=1)
        return int(parser.parse_known_args(self.flags)[0].num_machines)


ONE = Processes()
"""This process alone."""


class Outcome(NamedTuple):
    """What a stage reports, for the receipt.

    Attributes:
        report: Its report, jsonable.
        patches: `qat.patches.registry.handled()` of the process that did it.
    """

    report: dict[str, Any]
    patches: list[Any]


def run_stage(stage: str, recipe: Recipe, paths: Sequence[Path], processes: Processes = ONE) -> Outcome:
    """Run a training stage, or go on with it; the number of processes may be another than before.

    Args:
        stage: Key of `STAGES`.
        recipe: What to train.
        paths: Further arguments of the stage's function; the last one is its folder.
        processes: One is this process.

    Raises:
        UserError: There are fewer GPUs than asked for, several cannot do what the recipe asks, or the stage's own
            faults.
        RuntimeError: A process ended without saying why; the launcher's log tells more.
    """
    if processes.gpus == 1 and processes.flags:
        raise UserError(
            "There is nothing to launch for one GPU.",
            where="--launch-flags",
            value=" ".join(processes.flags),
            remedy="say with --gpus how many there are on all machines, or leave the flags out",
        )
    folder = paths[-1] / _FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    if processes.gpus == 1:
        return Outcome(_function(stage)(recipe, *paths).to_json(), list(handled()))
    _require_adapter(recipe)
    _require_devices(processes)
    _free_device()
    method = _method(stage, recipe, paths, processes)
    job = folder / "job.json"
    content = {
        "stage": stage,
        "recipe": recipe.model_dump_json(),
        "paths": [str(path.resolve()) for path in paths],
    }
    write_json(job, content)
    command = launch_command(method, processes, PROGRAM, job)
    if processes.machines > 1:
        print(f"on every other machine, with its own --machine_rank: {' '.join(command)}", file=sys.stderr, flush=True)
    status = supervise(command, folder / "launcher.log")
    if (fault := folder / "fault.json").is_file():
        raise UserError(**json.loads(fault.read_text(encoding="utf-8")))
    if status != 0:
        raise RuntimeError(f"a training process ended with status {status}; see {folder / 'launcher.log'}")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return Outcome(**result)


def launch_command(method: Sequence[str], processes: Processes, program: str, job: Path) -> list[str]:
    """The command that starts accelerate's launcher.

    Args:
        method: `REPLICATED`, `SHARDED`, or nothing for one process.
        processes: How many, and further flags.
        program: Module that each process runs.
        job: Its argument.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", *method, *_PLAIN]
    command += ["--num_processes", str(processes.gpus)]
    if processes.machines == 1:
        command += ["--num_machines", "1", "--main_process_port", "0"]
    command += [flag for flag in processes.flags if flag not in _METHODS]
    return [*command, "-m", program, str(job.resolve())]


def _function(stage: str) -> Callable[..., Any]:
    module, name = STAGES[stage]
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _require_adapter(recipe: Recipe) -> None:
    """Refuse what has no way over several processes: packed weights are tensors of a kind of their own.

    Raises:
        UserError: The recipe packs the base, or trains more than an adapter.
    """
    for key, value, allowed in (
        ("memory", recipe.train.memory, "bf16"),
        ("trains", recipe.train.trains, "adapter"),
    ):
        if value != allowed:
            raise UserError(
                "Several GPUs train an adapter on a BF16 base, nothing else.",
                where=f"train.{key}",
                value=value,
                remedy=f"train on one GPU, or set train.{key} to {allowed}",
            )


def _require_devices(processes: Processes) -> None:
    """Check that this machine can run its part of the processes.

    Raises:
        UserError: There are fewer GPUs than asked for.
    """
    import torch

    here, visible = processes.gpus // processes.machines, torch.cuda.device_count()
    if here * processes.machines != processes.gpus:
        raise UserError(
            "The GPUs cannot be shared out over the machines.",
            where="--gpus",
            value=f"{processes.gpus} over {processes.machines} machines",
            remedy="give every machine the same number",
        )
    # accelerate's own switch. Processes on CPUs are for tests: they share no memory, only time.
    on_cpus = visible == 0 and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if visible < here and not on_cpus:
        raise UserError(
            "There are fewer GPUs than asked for.",
            where="--gpus",
            value=f"{here} asked for on this machine, {visible} visible",
            remedy="ask for fewer; without a GPU leave --gpus out, training then uses all cores of the CPU",
        )


def _method(stage: str, recipe: Recipe, paths: Sequence[Path], processes: Processes) -> tuple[str, ...]:
    """Keep the base as the flags say; else whole where that fits every GPU, in parts where it does not.

    Raises:
        UserError: A preset or a file of the stage does not fit the base.
    """
    import torch

    asked = [way for name, way in _METHODS.items() if name in processes.flags]
    if asked:
        return asked[0]
    if not torch.cuda.is_available():
        return REPLICATED  # accelerate has FSDP2 on accelerators only
    from qat.quant.state import QuantState
    from qat.train.before import fits_whole

    quantized = list(QuantState.load(paths[_QUANT_STATE]).modules) if stage == "distill" else []
    here = range(processes.gpus // processes.machines)
    free = float(min(torch.cuda.mem_get_info(number)[0] for number in here))
    return REPLICATED if fits_whole(recipe, paths[0], stage, quantized, processes.gpus, free) else SHARDED


def _free_device() -> None:
    """Leave the GPU to the processes that are to come: an earlier stage here may have left gigabytes in its cache."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def supervise(command: Sequence[str], log: Path, seconds: float | None = None) -> int:
    """Run the launcher to its end; it ends with this process, however that ends.

    Its own words and those of all processes but the first go to the log, those of the first to standard error.

    Args:
        command: The launcher.
        log: File for its words.
        seconds: When to end it; None for never.

    Returns:
        Its exit status.

    Raises:
        subprocess.TimeoutExpired: It was ended.
    """
    with log.open("wb") as file:
        launcher = subprocess.Popen(
            command, stdout=sys.__stderr__, stderr=file, start_new_session=True, preexec_fn=end_with_parent
        )
        try:
            return launcher.wait(seconds)
        except BaseException:
            launcher.terminate()
            try:
                launcher.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
            raise


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have Linux send this process a signal when its parent is gone, even by SIGKILL."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)


def main(job: Path) -> int:
    """One process of a stage, as the launcher starts it.

    Args:
        job: What to do, as `run_stage` wrote it.

    Returns:
        Exit status.
    """
    end_with_parent(signal.SIGKILL)
    first = os.environ["RANK"] == "0"
    # The launcher's standard output is the command's standard error.
    os.dup2(1, 2) if first else os.dup2(2, 1)

    import torch

    from qat.recipe.schema import Recipe
    from qat.train import parallel

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    parallel.take_part(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    todo = json.loads(job.read_text(encoding="utf-8"))
    paths = [Path(path) for path in todo["paths"]]
    if not first:
        paths[-1] = job.parent / f"process-{parallel.rank()}"
    try:
        report = _function(todo["stage"])(Recipe.model_validate_json(todo["recipe"]), *paths).to_json()
    except UserError as error:
        value = error.value if error.value is None or isinstance(error.value, str) else repr(error.value)
        fault = {"what": error.what, "where": error.where, "value": value, "remedy": error.remedy}
        write_json(job.parent / "fault.json", fault)
        return int(ExitCode.USER_ERROR)
    if first:
        write_json(job.parent / "result.json", {"report": report, "patches": handled()})
    parallel.barrier()
    torch.distributed.destroy_process_group()
    return int(ExitCode.DONE)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
