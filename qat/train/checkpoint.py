"""Resumable checkpoints: what the loop needs to go on as if it had never stopped, in safetensors and JSON.

A checkpoint counts only with its marker file, which is written and synced after all others; a folder without it is
what a kill left behind and is deleted. Each carries the fingerprint of the training it belongs to: another recipe,
base or data set does not resume it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from qat.storage import write_atomic, write_json

MARKER = "COMPLETE"
STATE = "state.json"
TRAINER_STATE = "trainer_state.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        parameters: Trainable parameters by name, float32.
        extra: Further tensors of the objective, such as the ranges of quantizers.
        optimizer: State dictionary of the optimizer; empty before the first step.
        scheduler: State dictionary of the learning-rate scheduler; empty before the first step.
        random: States of torch's generators by device, uint8.
    """

    parameters: dict[str, Tensor]
    extra: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    random: dict[str, Tensor]


def random_states() -> dict[str, Tensor]:
    """States of torch's generators: the CPU's and, where there is one, the first GPU's."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: Mapping[str, Tensor]) -> None:
    """Set torch's generators to what `random_states` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return root / f"checkpoint-{step}"


def write(root: Path, step: int, checkpoint: Checkpoint, trainer_state: str, fingerprint: str) -> None:
    """Write one checkpoint, its marker last.

    Args:
        root: Folder of all checkpoints.
        step: Optimizer steps done.
        checkpoint: The content.
        trainer_state: JSON of the Trainer's own state.
        fingerprint: Of the training.

    Raises:
        UserError: The disk is full.
    """
    folder = folder_of(root, step)
    # Without its marker first, so that a kill while overwriting leaves nothing that looks whole.
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    tensors: dict[str, Tensor] = {}
    for prefix, group in (
        ("parameters", checkpoint.parameters),
        ("extra", checkpoint.extra),
        ("random", checkpoint.random),
    ):
        tensors |= {f"{prefix}/{name}": tensor for name, tensor in group.items()}
    slots: dict[str, dict[str, Any]] = {}
    for index, slot in checkpoint.optimizer.get("state", {}).items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in slot.items() if isinstance(value, Tensor)}
        slots[str(index)] = {key: value for key, value in slot.items() if not isinstance(value, Tensor)}
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(folder / "tensors.safetensors", save(held))
    state = {
        "fingerprint": fingerprint,
        "optimizer": {"slots": slots, "param_groups": checkpoint.optimizer.get("param_groups", [])},
        "scheduler": checkpoint.scheduler,
    }
    write_json(folder / STATE, state)
    write_atomic(folder / TRAINER_STATE, trainer_state)
    write_atomic(folder / MARKER, f"{step}\n")


def read(folder: Path) -> Checkpoint:
    """Read a complete checkpoint."""
    groups: dict[str, dict[str, Tensor]] = {"parameters": {}, "extra": {}, "random": {}}
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    slots: dict[int, dict[str, Any]] = {int(index): dict(slot) for index, slot in state["optimizer"]["slots"].items()}
    for name, tensor in load_file(folder / "tensors.safetensors").items():
        group, _, key = name.partition("/")
        if group == "optimizer":
            index, _, slot = key.partition("/")
            slots[int(index)][slot] = tensor
        else:
            groups[group][key] = tensor
    optimizer = {"state": slots, "param_groups": state["optimizer"]["param_groups"]}
    return Checkpoint(groups["parameters"], groups["extra"], optimizer, state["scheduler"], groups["random"])


def newest(root: Path, fingerprint: str) -> tuple[Path | None, list[str]]:
    """Find where to go on, and delete what cannot be gone on from.

    Args:
        root: Folder of all checkpoints; need not exist.
        fingerprint: Of the training at hand.

    Returns:
        The complete checkpoint of most steps with this fingerprint, or None; and what was deleted, with the reason.
    """
    kept: list[tuple[int, Path]] = []
    deleted: list[str] = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        match = _FOLDER.fullmatch(folder.name)
        if match is None:
            continue
        if not (folder / MARKER).is_file():
            reason = "half-written"
        elif json.loads((folder / STATE).read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
            reason = "of another training"
        else:
            kept.append((int(match[1]), folder))
            continue
        shutil.rmtree(folder)
        deleted.append(f"{folder.name}: {reason}")
    return (max(kept)[1] if kept else None), deleted


def prune(root: Path, keep: set[int]) -> None:
    """Delete all checkpoints but those of the steps in `keep`."""
    for folder in root.iterdir():
        match = _FOLDER.fullmatch(folder.name)
        if match is not None and int(match[1]) not in keep:
            # The marker goes first: a kill in between leaves a folder that counts as half-written.
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)
