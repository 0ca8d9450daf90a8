"""The jobs of the matrix, each a function of a work folder; files say what is done, so a job is never done twice.

Everything is trained, calibrated, merged and loaded by the functions of the chain.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qat.matrix import design
from qat.storage import write_json

if TYPE_CHECKING:
    import torch

    from qat.data.schema import Conversation


@dataclass(frozen=True)
class Place:
    """Where things lie, and how much is done.

    Attributes:
        work: Folder of checkpoints and results.
        scale: Key of `design.SCALES`.
        texts: Folder of real texts for the second base, or None to pretrain it on generated text alone.
        pretrain_seconds: Device time of the second base's pretraining.
        processes: That generate its text.
    """

    work: Path
    scale: str
    texts: Path | None = None
    pretrain_seconds: float = 140.0
    processes: int = 2

    @property
    def amount(self) -> design.Scale:
        """How much of everything."""
        return design.SCALES[self.scale]

    def base(self, name: str) -> Path:
        """Folder of a base checkpoint."""
        if name == "small":
            return self.work / "small" / "base"
        return Path(__file__).resolve().parents[1] / "data" / "tiny_base"

    def persona(self, name: str) -> Path:
        """Folder of the merged BF16 persona of a base."""
        return self.work / name / "persona"

    def state(self, name: str, preset: str) -> Path:
        """Folder of a calibration."""
        return self.work / name / "calibration" / preset

    def file(self, name: str, what: str) -> Path:
        """Conversations of a base's trainings: `train`, `validation`, `lessons`, `chooses`, `replies`."""
        return self.work / name / f"{what}.jsonl"

    def trained(self, arm: design.Arm) -> Path:
        """Folder of a training under quantization."""
        return self.work / arm.base / "trained" / arm.name.replace("/", "-")

    def result(self, name: str) -> Path:
        """What a job found, by the job's name."""
        return self.work / "results" / f"{name.replace('/', '--')}.json"


def pretrain_small(place: Place, base: str) -> dict[str, Any]:
    """The second base, from scratch."""
    import torch

    from qat.train.tiny_base import Pretraining, pretrain

    cuda = torch.cuda.is_available()
    settings = Pretraining(
        documents=place.amount.documents, batch=128, learning_rate=2e-3, warmup=100, shape="small", texts_copies=4
    )
    if not cuda:
        settings = Pretraining(documents=place.amount.documents, batch=2, steps=2, shape="small")
    pretrain(
        settings,
        place.work / base / "pretraining",
        place.base(base),
        device="cuda" if cuda else "cpu",
        workers=place.processes,
        seconds=1e9,
        texts=place.texts,
        fit_seconds=place.pretrain_seconds if cuda else None,
        say=lambda line: print(line, flush=True),
    )
    made: dict[str, Any] = json.loads((place.base(base) / "pretraining.json").read_text(encoding="utf-8"))
    return made


def make_persona(place: Place, base: str) -> dict[str, Any]:
    """Conversations, fine-tuning by LoRA, and the merged BF16 checkpoint that everything else stands on."""
    from qat.data.generate import conversations as generate
    from qat.data.load import save_conversations
    from qat.data.schema import load_persona
    from qat.export import export_checkpoint
    from qat.inputs import split
    from qat.train.sft import train_sft

    amount, persona = place.amount, load_persona(design.PERSONA)
    made = cast("list[Conversation]", generate(persona, amount.conversations, 11))
    parts = dict(zip(("train", "validation"), split(made, 0.1, 11), strict=True))
    # The seeds of the recipe annie_tiny_full.
    for name, count, seed, held_out, joined in (
        ("lessons", amount.lessons, 12, False, 5),
        ("chooses", amount.chooses, 13, False, 5),
        ("replies", amount.replies, 11, True, 1),
    ):
        parts[name] = cast("list[Conversation]", generate(persona, count, seed, held_out=held_out, joined=joined))
    place.file(base, "train").parent.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        save_conversations(place.file(base, name), part)
    recipe = design.recipe(place.base(base), amount, design.Arm(base, "bf16"))
    sft = place.work / base / "sft"
    report = train_sft(recipe, place.base(base), place.file(base, "train"), place.file(base, "validation"), sft)
    export_checkpoint(place.base(base), place.persona(base), adapters=[sft / "adapter"])
    return {"training": report.to_json()}


def calibrate(place: Place, base: str, preset: str) -> dict[str, Any]:
    """The ranges of a preset on the BF16 persona."""
    from qat.calibration import calibrate as set_ranges

    persona = place.persona(base)
    recipe = design.recipe(persona, place.amount, design.Arm(base, "ptq", preset))
    report = set_ranges(recipe, preset, persona, persona, place.file(base, "train"), place.state(base, preset))
    return {"quantized": report.quantized, "skipped": len(report.skipped), "starved": report.starved}


def run_arm(place: Place, arm: design.Arm) -> dict[str, Any]:
    """Train an arm where it is one that is trained, and measure it."""
    from qat.matrix.measure import measure, questions, shared

    begun = time.monotonic()
    training = _train(place, arm) if arm.kind in design.OBJECTIVES else None
    trained = time.monotonic() - begun
    texts = place.texts if arm.base == "small" else None
    persona = place.persona(arm.base)
    asked = questions(place.base(arm.base), persona, place.file(arm.base, "replies"), texts, place.amount)
    found = measure(_load(place, arm), asked)
    found["seconds"]["training"] = round(trained, 1)
    shutil.rmtree(place.trained(arm), ignore_errors=True)  # checkpoints of masters and moments: gigabytes in all
    if arm.kind == "bf16":
        write_json(place.result(f"{arm.base}/shared"), {**shared(asked), "device": _device()})
    return {"arm": arm.to_json(), **found, "training": training}


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def _train(place: Place, arm: design.Arm) -> dict[str, Any]:
    from qat.train.distill import QUANT_STATE, distill

    persona, lessons, chooses = (
        place.persona(arm.base),
        place.file(arm.base, "lessons"),
        place.file(arm.base, "chooses"),
    )
    recipe = design.recipe(persona, place.amount, arm)
    state = place.state(arm.base, str(arm.preset)) / QUANT_STATE
    report = distill(recipe, persona, persona, state, lessons, chooses, place.trained(arm)).to_json()
    kept = ("adapter_sha256", "coverage", "quantized", "train", "validation", "growth", "loop")
    return {key: report[key] for key in kept}


def _load(place: Place, arm: design.Arm) -> torch.nn.Module:
    """The model of an arm as it would be exported: `qat.train.divergence` loads arms in the same way."""
    from qat.train.adapters import load_adapter
    from qat.train.base import base_sha256, load_base
    from qat.train.distill import ADAPTER_FOLDER, QUANT_STATE
    from qat.train.full import MODEL_FOLDER
    from qat.train.persona import persona_sha256
    from qat.train.student import load_quant_state, quantize_

    model: torch.nn.Module
    if arm.kind == "base":
        model = load_base(place.base(arm.base))
        return model
    persona, folder = place.persona(arm.base), place.trained(arm)
    standing = base_sha256(persona)
    if arm.trains == "all":
        model, standing = load_base(folder / MODEL_FOLDER), base_sha256(folder / MODEL_FOLDER)
    elif arm.trains == "adapter":
        model = load_adapter(load_base(persona), folder / ADAPTER_FOLDER, standing, parent=persona_sha256(persona))
    else:
        model = load_base(persona)
    if arm.kind != "bf16":
        ranges = folder if arm.trains else place.state(arm.base, str(arm.preset))
        quantize_(model, persona, load_quant_state(ranges / QUANT_STATE, persona, standing))
    return model


@dataclass(frozen=True)
class Job:
    """Something to be done by one process.

    Attributes:
        name: Also of its result's file.
        needs: Names of jobs that must be done before.
        alone: No other job runs on its GPU meanwhile.
        arm: The arm that is measured; None for the jobs before.
    """

    name: str
    needs: tuple[str, ...] = ()
    alone: bool = False
    arm: design.Arm | None = None

    def run(self, place: Place) -> dict[str, Any]:
        """Do it."""
        if self.arm is not None:
            return run_arm(place, self.arm)
        base, what, *rest = self.name.split("/")
        steps: dict[str, Callable[..., dict[str, Any]]] = {
            "pretraining": pretrain_small,
            "persona": make_persona,
            "calibration": calibrate,
        }
        return steps[what](place, base, *rest)


def jobs_of(bases: tuple[str, ...]) -> list[Job]:
    """All jobs, in the order in which they are begun where nothing else decides.

    The second base comes first, because its pretraining is long; its arms take turns with those of the first.
    """
    first: list[Job] = []
    arms: list[list[Job]] = []
    for base in reversed(bases):
        made = () if base == "tiny" else (f"{base}/pretraining",)
        if made:
            first.append(Job(made[0], alone=True))
        first.append(Job(f"{base}/persona", made))
        persona = (f"{base}/persona",)
        first += [Job(f"{base}/calibration/{preset}", persona) for preset in design.PRESETS]
        own = []
        for arm in design.arms_of(base):
            needs = (f"{base}/calibration/{arm.preset}",) if arm.preset else persona
            own.append(Job(arm.name, needs, arm=arm))
        arms.append(own)
    return first + [job for turn in zip(*arms, strict=True) for job in turn]
