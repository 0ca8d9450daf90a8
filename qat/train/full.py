"""Training all weights: what is trained, float32 master weights, and the model that is written.

The network computes with BF16 weights, those that are exported and served; the optimizer keeps a float32 copy of each,
moves that, and rounds it into the network. For small models and comparisons: 16 bytes a weight (`qat.train.memory`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim.adamw import adamw

from qat import __version__
from qat.quant.names import memory_name
from qat.storage import write_atomic, write_json
from qat.train.adapters import Coverage
from qat.train.base import weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_FOLDER = "model"
SIDECAR = "qat_model.json"

_ROUTER = re.compile(r".*\.(gate|router)\..*")
_ENDS = re.compile(r".*(embed|lm_head).*")
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<projection>gate_proj|up_proj|down_proj)\.weight")


def train_all_(model: PreTrainedModel, *, ends: bool) -> Coverage:
    """Let every weight be trained but the router's, whose routes calibration and presets stand on.

    Args:
        model: Changed in place.
        ends: Whether embeddings and output layer are trained too. Not in distillation: the teacher's answers are kept
            as hidden states, which its output layer has to turn into the same probabilities to the end.

    Returns:
        What is trained.

    Raises:
        UserError: The names of this model type's tensors are not known, so that the result could not be written.
    """
    memory_name("", str(model.config.model_type))
    skipped: dict[str, int] = {}
    routers = 0
    for name, parameter in model.named_parameters():
        is_router, is_end = bool(_ROUTER.fullmatch(name)), bool(_ENDS.fullmatch(name))
        routers += is_router
        parameter.requires_grad_(not is_router and (ends or not is_end))
        if not parameter.requires_grad:
            ending = ".".join(name.split(".")[-2:])
            skipped[ending] = skipped.get(ending, 0) + 1
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in model.parameters())
    return Coverage({"all": len(trained)}, sum(trained), total, skipped, routers)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on float32 copies of the parameters, which it rounds into the network after every step.

    With BF16 weights alone an update smaller than half of a weight's last bit is lost; here it adds up in the copy.

    Args:
        parameters: Of any floating dtype, or groups of them.
        lr: Learning rate.
        weight_decay: Decoupled, as in AdamW.
    """

    def __init__(
        self, parameters: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move the masters along the gradients and round them into the parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["master"] = parameter.detach().float().clone()
                    state["exp_avg"] = torch.zeros_like(state["master"])
                    state["exp_avg_sq"] = torch.zeros_like(state["master"])
                adamw(
                    [state["master"]],
                    [parameter.grad.float()],
                    [state["exp_avg"]],
                    [state["exp_avg_sq"]],
                    [],
                    [state["step"]],
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                parameter.copy_(state["master"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state; torch would round its tensors to the parameters' dtype."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, slot in state_dict["state"].items():
            own = self.state[parameters[index]]
            for key, value in slot.items():
                if isinstance(value, Tensor) and key != "step":
                    own[key] = value.detach().to(parameters[index].device, torch.float32).clone()


class MasterWeights:
    """For a loop: the optimizer with master weights, where the network has no adapter."""

    model: Any
    args: Any
    optimizer: Any

    def create_optimizer(self, *arguments: Any) -> torch.optim.Optimizer:
        """Trainer's hook."""
        if self.optimizer is None and not isinstance(self.model, PeftModel):
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            # As Trainer does: biases, norms and the state space's vectors do not decay.
            groups = [
                {"params": [one for one in trained if one.dim() >= 2], "weight_decay": self.args.weight_decay},
                {"params": [one for one in trained if one.dim() < 2], "weight_decay": 0.0},
            ]
            self.optimizer = MasterAdamW(groups, self.args.learning_rate)
        if self.optimizer is not None:
            made: torch.optim.Optimizer = self.optimizer
        else:
            made = super().create_optimizer(*arguments)  # type: ignore[misc]
        return made


def save_model(model: PreTrainedModel, base: Path, folder: Path, **origin: Any) -> None:
    """Write the trained model as a checkpoint with the base's files, names and dtypes; it appears when it is whole.

    Args:
        model: Plain or with quantizers; its parameters are written as they are before quantization.
        base: The checkpoint that it was loaded from.
        folder: Where it goes; replaced.
        origin: Facts for `qat_model.json`.

    Raises:
        RuntimeError: A trained parameter belongs to no tensor of the base, so that its training would be lost.
    """
    from safetensors import safe_open
    from safetensors.torch import save

    parameters = dict(model.named_parameters())
    model_type = str(model.config.model_type)
    fresh = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    files = weight_files(base)
    written: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        written |= {_holder(name, parameters, model_type) for name in stored}
        tensors = {name: _current(name, tensor, parameters, model_type) for name, tensor in stored.items()}
        write_atomic(fresh / path.name, save(tensors, metadata={"format": "pt"}))
    lost = [name for name, one in parameters.items() if one.requires_grad and name not in written]
    if lost:
        raise RuntimeError(f"{len(lost)} trained parameters are no tensors of the base, first {lost[0]}")
    for path in base.iterdir():
        if path.is_file() and path not in files and path.suffix != ".safetensors":
            shutil.copyfile(path, fresh / path.name)
    write_json(fresh / SIDECAR, {"qat_version": __version__, **origin})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)


def _holder(name: str, parameters: dict[str, Tensor], model_type: str) -> str:
    """The parameter that a tensor of the checkpoint stands in, whole or as one expert's part."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return memory_name(name, model_type)
    experts = memory_name(match["experts"], model_type)
    own, fused = f"{experts}.{match['projection']}", f"{experts}.gate_up_proj"
    return fused if own not in parameters and fused in parameters else own


def _current(name: str, stored: Tensor, parameters: dict[str, Tensor], model_type: str) -> Tensor:
    """The value that a tensor of the checkpoint has in the model; what the model does not train is kept as stored."""
    holder, match = _holder(name, parameters, model_type), _EXPERT.fullmatch(name)
    parameter = parameters.get(holder)
    if parameter is not None and match is not None:
        if holder.endswith("gate_up_proj"):
            parameter = parameter.chunk(2, dim=1)[0 if match["projection"] == "gate_proj" else 1]
        parameter = parameter[int(match["expert"])]
    return stored if parameter is None else parameter.detach().to("cpu", stored.dtype).contiguous()
