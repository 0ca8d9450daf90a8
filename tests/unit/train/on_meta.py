"""Count the bytes of a training step in its true shape without any memory: on `meta`, by the code that a GPU runs.

Tensors say that they are on a GPU, Triton's kernels do nothing (what they write to is allocated before), and the scan
is a function that keeps and allocates what mamba-ssm's does (`ssd_combined.py` 2.3.2). A dispatch mode counts the
storages that are alive.

Counting has a process of its own (`counted_apart`), because a real kernel that is launched on `meta` writes to null
pointers and breaks CUDA for the whole process: there no GPU is visible, Triton is stood in for before any kernel is
imported, and nothing of it is left in the tests' own modules.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

KERNELS = "qat.quant.kernels."


class _Nothing:
    """A Triton kernel that is launched and does nothing."""

    def __init__(self, function: object) -> None:
        del function

    def __getitem__(self, grid: object) -> Any:
        return lambda *_, **__: None


def _stand_in_for_triton() -> None:
    """Take Triton's place for the kernels, which are imported from now on."""
    module, language = ModuleType("triton"), ModuleType("triton.language")
    language.constexpr = object  # type: ignore[attr-defined]
    contents = {
        "jit": _Nothing,
        "cdiv": lambda a, b: -(-a // b),
        "next_power_of_2": lambda n: 1 << (n - 1).bit_length(),
        "language": language,
    }
    module.__dict__.update(contents)
    loaded = [name for name in sys.modules if name.startswith(KERNELS)]
    if loaded or torch.cuda.is_available():
        raise RuntimeError(f"Kernels could be launched on nothing: {loaded}")
    sys.modules.update({"triton": module, "triton.language": language})


class _OnGpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], is_causal=True)[0]
        return func(*args, **(kwargs or {}))


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were.

    Args:
        known: Tensors that do not count.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held = [tensor.untyped_storage() for tensor in known]
        self._seen = {id(storage) for storage in self._held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tensor:
        rows, length, heads, _ = x.shape
        decay = torch.empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(torch.empty_like(x, memory_format=torch.contiguous_format), x, dt, decay, b, c)
        ctx.chunk = chunk
        return ctx.to_save[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _, x, dt, _, b, c = ctx.saved_tensors
        with torch.device("meta"):
            (rows, length, heads, width), (groups, state), chunk = x.shape, b.shape[2:], ctx.chunk
            of_b, of_c, of_dt, copy_of_dt = (torch.empty_like(each) for each in (b, c, dt, dt))
            decays = [torch.empty(rows, heads, length, dtype=torch.float32) for _ in range(2)]
            products = torch.empty(rows, length // chunk, groups, chunk, chunk, dtype=torch.float32)
            shape = (rows, length // chunk, heads, width, state)
            wide = [torch.empty(shape, dtype=torch.float32) for _ in range(2)]
            narrow = [torch.empty(shape, dtype=x.dtype) for _ in range(2)]
            del wide
            of_x = torch.empty(x.shape, dtype=x.dtype)
            del narrow, products, decays, copy_of_dt
        return of_x, of_dt, of_b, of_c, None


def _scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *, chunk_size: int, **_: Any) -> Tensor:
    return _Scan.apply(x, dt, b, c, chunk_size)  # type: ignore[no-untyped-call,no-any-return]


def network(config: Any, modules: str = "", parameters: tuple[str, ...] = ()) -> Any:
    """A network as fine-tuning on a GPU has it: kernels, adapters of rank 16 with effective weights, fused experts.

    Args:
        config: Of Transformers; only its layers will be run.
        modules: Regular expression of linears with an adapter.
        parameters: Fused expert parameters with one.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qat.patches.registry import ensure
    from qat.quant.kernels import nemotron_h
    from qat.quant.lora import use_fast_experts_
    from qat.train.adapters import use_effective_weights_

    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16).requires_grad_(False)
    original, nemotron_h._scan = nemotron_h._scan, lambda: _scan
    try:
        nemotron_h.use_fast_layers_(model)
    finally:
        nemotron_h._scan = original
    if modules or parameters:
        ensure("peft_mamba_out_proj")
        settings = LoraConfig(r=16, target_modules=modules or [], target_parameters=list(parameters))
        adapted = get_peft_model(model, settings)
        use_effective_weights_(adapted)
        model = adapted.get_base_model()
    use_fast_experts_(model)
    return model.train()


class Counted(NamedTuple):
    """Bytes of one layer: kept after its forward, its input included, and the most in forward and backward."""

    kept: int
    peak: int


def count_layer(model: Any, number: int, rows: int, length: int) -> Counted:
    """Run one layer forward and backward on rows x length tokens."""
    layer, hidden = model.model.layers[number], model.config.hidden_size
    source = torch.empty(rows, length, hidden, dtype=torch.bfloat16, requires_grad=True)
    where: dict[str, Any] = {"position_ids": torch.arange(length)[None]}
    if hasattr(model.model, "rotary_emb"):
        where["position_embeddings"] = model.model.rotary_emb(source, where["position_ids"])
    rotary = where.get("position_embeddings", ())
    live = Live(source, where["position_ids"], *rotary, *model.parameters(), *model.buffers())
    with live:
        entry = source * 1
        result = layer(entry, attention_mask=None, **where)
        del entry
        gc.collect()
        kept = live.now - result.untyped_storage().nbytes()
        # In a network the next layer holds the result no longer, and its storage becomes the gradient's.
        result.backward(torch.empty_like(result))
        peak = live.peak - result.untyped_storage().nbytes()
    return Counted(kept, peak)


class Layers(NamedTuple):
    """A network whose layers are to be counted.

    Attributes:
        config: As `config.json` has it.
        modules: As of `network`.
        parameters: As of `network`.
        rows: Of the batch.
        length: Tokens a row.
    """

    config: dict[str, Any]
    modules: str
    parameters: Sequence[str]
    rows: int
    length: int


class Loss(NamedTuple):
    """Sizes of the loss's input."""

    vocabulary: int
    positions: int


def counted_apart(folder: Path, networks: Sequence[Layers], loss: Loss) -> tuple[list[list[Counted]], list[int]]:
    """Count in another process, in which no GPU is visible.

    Returns:
        Of each network its layers, and the peak bytes of cross entropy and of the divergence from a teacher.
    """
    job, out = folder / "job.json", folder / "counted.json"
    job.write_text(json.dumps([networks, loss]), encoding="utf-8")
    command = [sys.executable, "-m", __name__, str(job), str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=Path(__file__).parents[3], env=environment, check=True, timeout=110)
    layers, peaks = json.loads(out.read_text(encoding="utf-8"))
    return [[Counted(*layer) for layer in each] for each in layers], peaks


def _count_network(case: Layers) -> list[Counted]:
    from transformers import AutoConfig

    model = network(AutoConfig.for_model(**case.config), case.modules, tuple(case.parameters))
    return [count_layer(model, number, case.rows, case.length) for number in range(len(model.model.layers))]


def _count_loss(case: Loss) -> list[int]:
    from qat.train.objective import cross_entropy_sum, kl_sum

    weight = torch.empty(case.vocabulary, 64, dtype=torch.bfloat16)
    rows = torch.empty(case.positions, 64, dtype=torch.bfloat16, requires_grad=True)
    teacher, targets = torch.empty_like(rows.detach()), torch.empty(case.positions, dtype=torch.long)
    peaks = []
    for loss in (lambda: cross_entropy_sum(rows, weight, targets), lambda: kl_sum(rows, teacher, weight, 1.0)):
        with Live(weight, rows, teacher, targets) as live:
            loss().backward()
        peaks.append(live.peak)
    return peaks


def _main(job: Path, out: Path) -> None:
    # Libraries are imported as where none of these is installed; what the layers run of them has a stand-in.
    sys.modules.update(dict.fromkeys(("triton", "mamba_ssm", "causal_conv1d")))  # type: ignore[arg-type]
    import transformers.models.nemotron_h.modeling_nemotron_h

    import qat.quant.lora
    import qat.train.adapters

    del transformers, qat
    networks, loss = json.loads(job.read_text(encoding="utf-8"))
    _stand_in_for_triton()
    with torch.device("meta"), _OnGpu():
        layers = [_count_network(Layers(*case)) for case in networks]
        peaks = _count_loss(Loss(*loss))
    out.write_text(json.dumps([layers, peaks]), encoding="utf-8")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
