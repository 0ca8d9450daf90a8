"""The chain: one function per stage, each reading the folder of the stage before.

The stages know what they depend on and nothing of each other's inside; the packages they use are imported where they
are used, so that looking at a run needs no torch. `train`, `export_arms`, `judge` and `run_all` put them in order.
The stages up to the measurement of drift stand here, export, serving and the verdict in `judging`.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qat.artifacts import distilled, fine_tuned, modes, quant_state, trained, trained_by
from qat.data.records import Source
from qat.errors import UserError
from qat.inputs import (
    accepted_faults,
    base_folder,
    base_identity,
    demands_on_replies,
    persona_file,
    require_presets,
    split,
    tokenizer_identity,
)
from qat.judging import behavior, checkpoint_of, export, gate, load_suite_of, report, serve_block, serving
from qat.patches.registry import avoided, handled
from qat.patches.stages import AROUND
from qat.receipt import sha256_file
from qat.recipe.schema import Arm
from qat.runs import Run, write_json
from qat.train.launch import ONE, Processes, run_stage

if TYPE_CHECKING:
    from qat.behavior.gate import Verdict
    from qat.data.schema import Conversation

__all__ = [
    "AUDIT_FILE",
    "HELD_OUT_COUNT",
    "HELD_OUT_FILE",
    "NVFP4_KINDS",
    "SENSITIVITY",
    "TRAIN_FILE",
    "VALIDATION_FILE",
    "behavior",
    "calibrate",
    "checkpoint_of",
    "data",
    "distill",
    "divergence",
    "export",
    "export_arms",
    "gate",
    "give_memory_back",
    "judge",
    "load_suite_of",
    "report",
    "run_all",
    "sensitivity",
    "serve_block",
    "serving",
    "sft",
    "train",
]

TRAIN_FILE = "data/train.jsonl"
VALIDATION_FILE = "data/validation.jsonl"
HELD_OUT_FILE = "data/held_out.jsonl"
HELD_OUT_COUNT = 1000
AUDIT_FILE = "data/audit.json"
SENSITIVITY = "sensitivity.json"
NVFP4_KINDS = ("ptq", "distilled")


def run_all(run: Run) -> Verdict:
    """The whole chain."""
    train(run)
    export_arms(run, run.recipe.arms)
    return judge(run)


def train(run: Run, processes: Processes = ONE) -> None:
    """Data, fine-tuning, calibration, distillation, and how far every arm has drifted from the BF16 persona."""
    require_presets(run.recipe)
    data(run)
    if any(arm.kind != "base" for arm in run.recipe.arms):
        sft(run, processes)
    for preset in run.recipe.presets:
        calibrate(run, preset)
    for preset in run.recipe.distilled_presets:
        distill(run, preset, processes)
    if run.recipe.presets:
        divergence(run)


def export_arms(run: Run, arms: Sequence[Arm]) -> list[Path]:
    """Export these arms; the base arm is served from its own folder and needs none."""
    return [export(run, arm) for arm in arms if arm.kind != "base"]


def judge(run: Run) -> Verdict:
    """Serve each arm in turn, run the suite on it, decide, and write the report."""
    suite = load_suite_of(run.recipe)
    give_memory_back()
    # The reference first: the others are compared with it on its replies.
    reference = run.recipe.behavior.gate.reference
    for arm in sorted(run.recipe.arms, key=lambda arm: arm.name != reference):
        behavior(run, arm, suite)
    verdict = gate(run, suite)
    report(run)
    return verdict


def give_memory_back() -> None:
    """Return freed memory to the system and to the GPU, before a stage or a server starts.

    A trained network and its loop refer to each other in circles, which only a collection frees, and two networks of
    30B do not fit beside each other. What torch's cache and glibc's arenas keep of it (gigabytes of activations) counts
    as taken for everybody else; other systems than glibc's have no such call to make.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# The stages -----------------------------------------------------------------------------------------------------------


def data(run: Run) -> None:
    """Generate or load the conversations, audit them, split off a validation set.

    Raises:
        UserError: The audit found faults; `data/audit.json` holds them all.
    """
    recipe = run.recipe
    block = recipe.data
    source = None if block.count is not None else Source(block.source)
    inputs = {
        "data": block.model_dump(mode="json"),
        "source_sha256": None if source is None else source.sha256(),
        "persona_sha256": sha256_file(persona_file(recipe)),
        "tokenizer": tokenizer_identity(recipe),
    }
    with run.stage("data", inputs=inputs, outputs=[TRAIN_FILE, VALIDATION_FILE, AUDIT_FILE], work=["data"]) as stage:
        if stage.done:
            return
        from qat.data.generate import conversations as generate
        from qat.data.load import load_conversations, save_conversations
        from qat.data.schema import load_persona

        if block.count is None:
            conversations = load_conversations(block.source)
        else:
            # Through the file and back: generated conversations pass the same checks as anybody's.
            everything = run.path("data", "conversations.jsonl")
            made = generate(load_persona(recipe.persona), block.count, block.seed)
            save_conversations(everything, cast("list[Conversation]", made))
            conversations = load_conversations(everything)
            everything.unlink()
        _require_sound(run, conversations, AUDIT_FILE, accepted_faults(block.accept))
        training, validation = split(conversations, block.validation_fraction, block.seed)
        save_conversations(run.path(TRAIN_FILE), training)
        save_conversations(run.path(VALIDATION_FILE), validation)
        stage.note(conversations=len(conversations), training=len(training), validation=len(validation))
        if source is not None:
            stage.note(source_files=source.names)
        stage.note(patches=avoided(*AROUND["data"]))


def _require_sound(run: Run, conversations: list[Conversation], name: str, accepted: Collection[str]) -> None:
    """Audit conversations against the persona and the suite; all findings are kept in the run's folder."""
    from qat.data.audit import audit
    from qat.data.schema import load_persona
    from qat.train.base import load_tokenizer

    recipe = run.recipe
    persona, tokenizer = load_persona(recipe.persona), load_tokenizer(recipe.base, base_folder(recipe))
    demands = demands_on_replies(recipe)
    findings = audit(conversations, persona, tokenizer, recipe.data.max_length, demands, accepted)
    write_json(run.path(name), findings.to_json())
    if findings.faults:
        shown = "\n          ".join(str(fault) for fault in list(findings.faults)[:5])
        raise UserError(
            f"the conversations have {len(findings.faults)} faults",
            where=str(run.path(name)),
            value=shown,
            remedy="mend the data (`qat data audit` shows all of them), or name what to accept in data.accept",
        )


def sft(run: Run, processes: Processes = ONE) -> None:
    """Fine-tune the BF16 persona."""
    recipe = run.recipe
    inputs = {
        "base": base_identity(recipe),
        "adapter": recipe.train.adapter.model_dump(mode="json"),
        "sft": recipe.train.sft.model_dump(mode="json"),
        "seed": recipe.seed,
        **modes(recipe),
    }
    with run.stage("sft", inputs=inputs, outputs=[f"sft/{trained(recipe)}"], needs=["data"], work=["sft"]) as stage:
        if stage.done:
            return
        paths = base_folder(recipe), run.path(TRAIN_FILE), run.path(VALIDATION_FILE), run.path("sft")
        done = run_stage("sft", recipe, paths, processes)
        stage.note(**done.report, patches=done.patches)


def calibrate(run: Run, preset: str) -> None:
    """Set the scales of one preset on the BF16 persona."""
    recipe = run.recipe
    folder = f"calibration/{preset}"
    own = recipe.quant.presets.get(preset)
    inputs = {
        "quant": recipe.quant.model_dump(mode="json", exclude={"presets"}),
        "preset": preset if own is None else own.model_dump(mode="json"),
        "seed": recipe.seed,
    }
    outputs = [f"{folder}/quant_state.safetensors"]
    with run.stage(f"calibrate/{preset}", inputs=inputs, outputs=outputs, needs=["sft"], work=[folder]) as stage:
        if stage.done:
            return
        from qat.calibration import calibrate as calibrate_persona

        give_memory_back()
        result = calibrate_persona(
            recipe, preset, base_folder(recipe), fine_tuned(run), run.path(TRAIN_FILE), run.path(folder)
        )
        notes = result.to_json()
        if notes.get("remedy"):
            run.say(f"[calibrate/{preset}] experts saw too few tokens. {notes['remedy']}")
        stage.note(**notes, patches=handled())


def sensitivity(run: Run, formats: Sequence[str], conversations: int) -> None:
    """Measure what every group of weights costs when it alone is quantized; no part of `run_all`."""
    recipe = run.recipe
    inputs = {
        "calibration": recipe.quant.calibration.model_dump(mode="json"),
        "formats": list(formats),
        "conversations": conversations,
        "seed": recipe.seed,
    }
    with run.stage("sensitivity", inputs=inputs, outputs=[SENSITIVITY], needs=["sft"]) as stage:
        if stage.done:
            return
        from qat.calibration.sensitivity import measure

        give_memory_back()
        base, train, held_out = base_folder(recipe), run.path(TRAIN_FILE), _held_out(run)
        measured = measure(recipe, base, fine_tuned(run), train, held_out, formats=formats, conversations=conversations)
        write_json(run.path(SENSITIVITY), measured.to_json())
        stage.note(conversations=measured.conversations, tokens=measured.tokens, patches=handled())


def distill(run: Run, preset: str, processes: Processes = ONE) -> None:
    """Distil the BF16 persona into its four-bit self under one preset."""
    recipe = run.recipe
    folder = f"distill/{preset}"
    inputs = {
        "adapter": recipe.distill_adapter.model_dump(mode="json"),
        "distill": recipe.train.distill.model_dump(mode="json", exclude={"adapter"}),
        "seed": recipe.seed,
    }
    replies = recipe.train.distill.replies
    written = None if replies is None or replies.file is None else Source(replies.file)
    if written is not None:
        inputs["replies_sha256"] = written.sha256()
    outputs = [f"{folder}/{trained(recipe)}", f"{folder}/quant_state.safetensors"]
    needs = ["sft", f"calibrate/{preset}"]
    with run.stage(f"distill/{preset}", inputs=inputs, outputs=outputs, needs=needs, work=[folder]) as stage:
        if stage.done:
            return
        if written is not None:
            _audit_replies(run, written, f"{folder}/replies.audit.json")
        state = run.path("calibration", preset, "quant_state.safetensors")
        paths = base_folder(recipe), fine_tuned(run), state, *_lessons(run, folder), run.path(folder)
        give_memory_back()
        done = run_stage("distill", recipe, paths, processes)
        if done.report["loop"]["best_step"] == 0:
            run.say(
                f"[distill/{preset}] no step came below plain NVFP4 on the held-out replies: what is kept is untrained "
                "and the same as a ptq arm. Try another train.distill.learning_rate, or more steps and rows"
            )
        stage.note(**done.report, patches=done.patches)


def _audit_replies(run: Run, source: Source, name: str) -> None:
    """Audit a file of the persona's replies as training data is audited, prompt, tools and leaks.

    Not what it says: the student is to say the same, also where that fails a check of the suite.
    """
    from qat.behavior.checks import check_names
    from qat.data.load import load_conversations

    accepted = accepted_faults(run.recipe.data.accept) | frozenset(check_names())
    _require_sound(run, load_conversations(source.path), name, accepted)


def _lessons(run: Run, folder: str) -> tuple[Path, Path]:
    """What to distil on and what chooses the step: the run's conversations, or fresh ones where the recipe says so."""
    block, data = run.recipe.train.distill.prompts, run.recipe.data
    if block is None:
        return run.path(TRAIN_FILE), run.path(VALIDATION_FILE)
    lessons = _generated(run, f"{folder}/prompts.jsonl", block.count, data.seed + 1, joined=block.joined)
    if block.validation is None:
        return lessons, run.path(VALIDATION_FILE)
    chooses = _generated(run, f"{folder}/validation.jsonl", block.validation, data.seed + 2, joined=block.joined)
    return lessons, chooses


def _generated(run: Run, name: str, count: int, seed: int, *, held_out: bool = False, joined: int = 1) -> Path:
    """Write conversations of the generator into the run's folder."""
    from qat.data.generate import conversations as generate
    from qat.data.load import save_conversations
    from qat.data.schema import load_persona

    made = generate(load_persona(run.recipe.persona), count, seed, held_out=held_out, joined=joined)
    save_conversations(run.path(name), cast("list[Conversation]", made))
    return run.path(name)


def divergence(run: Run) -> None:
    """KL and top-1 agreement of every arm with the BF16 persona, on held-out replies."""
    recipe = run.recipe
    arms = [arm for arm in recipe.arms if arm.kind in NVFP4_KINDS]
    held_out = None if recipe.data.count is None else HELD_OUT_COUNT
    inputs = {
        "arms": [arm.model_dump(mode="json") for arm in arms],
        "max_length": recipe.data.max_length,
        "held_out": held_out,
    }
    needs = ["sft", *dict.fromkeys(need for arm in arms for need in trained_by(arm))]
    with run.stage("divergence", inputs=inputs, outputs=["divergence.json"], needs=needs) as stage:
        if stage.done:
            return
        from qat.train.divergence import measure

        give_memory_back()
        states = {arm.name: (distilled(run, arm), quant_state(run, arm)) for arm in arms}
        rows = _held_out(run)
        measured = measure(recipe, base_folder(recipe), fine_tuned(run), states, rows)
        found = {name: arm.to_json() for name, arm in measured.items()}
        write_json(run.path("divergence.json"), found)
        router = {name: arm["router"] for name, arm in found.items() if arm.get("router")}
        stage.note(rows=rows.name, router=router, patches=handled())


def _held_out(run: Run) -> Path:
    """Conversations that chose no checkpoint: the validation set picks the best step, and flatters the one it picked.

    Generated data has a half of its own for this. A file of conversations has none: the validation set serves, and
    the receipt's `rows` says so.
    """
    block = run.recipe.data
    if block.count is None:
        return run.path(VALIDATION_FILE)
    return _generated(run, HELD_OUT_FILE, HELD_OUT_COUNT, block.seed, held_out=True)
