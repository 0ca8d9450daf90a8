"""The chain: one function per stage, each reading the folder of the stage before.

The stages know what they depend on and nothing of each other's inside; the packages they use are imported where they
are used, so that looking at a run needs no torch. `train`, `export_arms`, `judge` and `run_all` put them in order.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qat.errors import UserError
from qat.inputs import base_folder, base_identity, persona_file, split, tokenizer_identity
from qat.patches.registry import avoided, handled
from qat.patches.stages import AROUND
from qat.receipt import sha256_file
from qat.recipe.schema import Arm, Recipe, ServeBlock
from qat.runs import Run, write_json

if TYPE_CHECKING:
    from qat.behavior.gate import Verdict
    from qat.behavior.suite import Suite
    from qat.data.schema import Conversation
    from qat.serve.launch import Endpoint

TRAIN_FILE = "data/train.jsonl"
VALIDATION_FILE = "data/validation.jsonl"
HELD_OUT_FILE = "data/held_out.jsonl"
HELD_OUT_COUNT = 1000
AUDIT_FILE = "data/audit.json"
SFT_ADAPTER = "sft/adapter"
NVFP4_KINDS = ("ptq", "distilled")


def run_all(run: Run) -> Verdict:
    """The whole chain."""
    train(run)
    export_arms(run, run.recipe.arms)
    return judge(run)


def train(run: Run) -> None:
    """Data, fine-tuning, calibration, distillation, and how far every arm has drifted from the BF16 persona."""
    data(run)
    if any(arm.kind != "base" for arm in run.recipe.arms):
        sft(run)
    for preset in run.recipe.presets:
        calibrate(run, preset)
    for preset in run.recipe.distilled_presets:
        distill(run, preset)
    if run.recipe.presets:
        divergence(run)


def export_arms(run: Run, arms: Sequence[Arm]) -> list[Path]:
    """Export these arms; the base arm is served from its own folder and needs none."""
    return [export(run, arm) for arm in arms if arm.kind != "base"]


def judge(run: Run) -> Verdict:
    """Serve each arm in turn, run the suite on it, decide, and write the report."""
    suite = load_suite_of(run.recipe)
    give_memory_back()
    for arm in run.recipe.arms:
        behavior(run, arm, suite)
    verdict = gate(run, suite)
    report(run)
    return verdict


def give_memory_back() -> None:
    """Return freed memory to the system before a server starts beside this process.

    glibc keeps what training freed (gigabytes of activations) in its arenas; elsewhere there is no such call to make.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# The stages -----------------------------------------------------------------------------------------------------------


def data(run: Run) -> None:
    """Generate or load the conversations, audit them, split off a validation set.

    Raises:
        UserError: The audit found faults; `data/audit.json` holds them all.
    """
    recipe = run.recipe
    block, base = recipe.data, base_folder(recipe)
    source = None if block.source == "generated" else sha256_file(Path(block.source))
    inputs = {
        "data": block.model_dump(mode="json"),
        "source_sha256": source,
        "persona_sha256": sha256_file(persona_file(recipe)),
        "tokenizer": tokenizer_identity(recipe),
    }
    with run.stage("data", inputs=inputs, outputs=[TRAIN_FILE, VALIDATION_FILE, AUDIT_FILE], work=["data"]) as stage:
        if stage.done:
            return
        from qat.data.audit import audit
        from qat.data.generate import conversations as generate
        from qat.data.load import load_conversations, save_conversations
        from qat.data.schema import load_persona
        from qat.train.base import load_tokenizer

        persona = load_persona(recipe.persona)
        if block.count is None:
            conversations = load_conversations(block.source)
        else:
            # Through the file and back: generated conversations pass the same checks as anybody's.
            everything = run.path("data", "conversations.jsonl")
            made = generate(persona, block.count, block.seed)
            save_conversations(everything, cast("list[Conversation]", made))
            conversations = load_conversations(everything)
            everything.unlink()
        findings = audit(conversations, persona, load_tokenizer(recipe.base, base), block.max_length)
        write_json(run.path(AUDIT_FILE), findings.to_json())
        if findings.faults:
            shown = "\n          ".join(str(fault) for fault in list(findings.faults)[:5])
            raise UserError(
                f"the conversations have {len(findings.faults)} faults",
                where=str(run.path(AUDIT_FILE)),
                value=shown,
                remedy="mend the data; `qat data audit` shows all of them",
            )
        training, validation = split(conversations, block.validation_fraction, block.seed)
        save_conversations(run.path(TRAIN_FILE), training)
        save_conversations(run.path(VALIDATION_FILE), validation)
        stage.note(conversations=len(conversations), training=len(training), validation=len(validation))
        stage.note(patches=avoided(*AROUND["data"]))


def sft(run: Run) -> None:
    """Fine-tune the BF16 persona."""
    recipe = run.recipe
    inputs = {
        "base": base_identity(recipe),
        "adapter": recipe.train.adapter.model_dump(mode="json"),
        "sft": recipe.train.sft.model_dump(mode="json"),
        "seed": recipe.seed,
    }
    with run.stage("sft", inputs=inputs, outputs=[SFT_ADAPTER], needs=["data"], work=["sft"]) as stage:
        if stage.done:
            return
        from qat.train.sft import train_sft

        files = run.path(TRAIN_FILE), run.path(VALIDATION_FILE)
        result = train_sft(recipe, base_folder(recipe), *files, run.path("sft"))
        stage.note(**result.to_json(), patches=handled())


def calibrate(run: Run, preset: str) -> None:
    """Set the scales of one preset on the BF16 persona."""
    recipe = run.recipe
    folder = f"calibration/{preset}"
    inputs = {"quant": recipe.quant.model_dump(mode="json"), "preset": preset, "seed": recipe.seed}
    outputs = [f"{folder}/quant_state.safetensors"]
    with run.stage(f"calibrate/{preset}", inputs=inputs, outputs=outputs, needs=["sft"], work=[folder]) as stage:
        if stage.done:
            return
        from qat.calibration import calibrate as calibrate_persona

        result = calibrate_persona(
            recipe, preset, base_folder(recipe), run.path(SFT_ADAPTER), run.path(TRAIN_FILE), run.path(folder)
        )
        stage.note(**result.to_json(), patches=handled())


def distill(run: Run, preset: str) -> None:
    """Distil the BF16 persona into its four-bit self under one preset."""
    recipe = run.recipe
    folder = f"distill/{preset}"
    inputs = {
        "adapter": recipe.distill_adapter.model_dump(mode="json"),
        "distill": recipe.train.distill.model_dump(mode="json", exclude={"adapter"}),
        "seed": recipe.seed,
    }
    outputs = [f"{folder}/adapter", f"{folder}/quant_state.safetensors"]
    needs = ["sft", f"calibrate/{preset}"]
    with run.stage(f"distill/{preset}", inputs=inputs, outputs=outputs, needs=needs, work=[folder]) as stage:
        if stage.done:
            return
        from qat.train.distill import distill as distill_persona

        result = distill_persona(
            recipe,
            base_folder(recipe),
            run.path(SFT_ADAPTER),
            run.path("calibration", preset, "quant_state.safetensors"),
            _lessons(run, folder),
            run.path(VALIDATION_FILE),
            run.path(folder),
        )
        stage.note(**result.to_json(), patches=handled())


def _lessons(run: Run, folder: str) -> Path:
    """What to distil on: the training conversations, or fresh ones where the recipe asks for them."""
    block = run.recipe.train.distill.prompts
    if block is None:
        return run.path(TRAIN_FILE)
    from qat.data.generate import conversations as generate
    from qat.data.load import save_conversations
    from qat.data.schema import load_persona

    made = generate(load_persona(run.recipe.persona), block.count, run.recipe.data.seed + 1, joined=block.joined)
    path = run.path(folder, "prompts.jsonl")
    save_conversations(path, cast("list[Conversation]", made))
    return path


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
    needs = ["sft", *dict.fromkeys(need for arm in arms for need in _trained_by(arm))]
    with run.stage("divergence", inputs=inputs, outputs=["divergence.json"], needs=needs) as stage:
        if stage.done:
            return
        from qat.train.divergence import measure

        states = {arm.name: (_distill_adapter(run, arm), _quant_state(run, arm)) for arm in arms}
        rows = _held_out(run)
        measured = measure(recipe, base_folder(recipe), run.path(SFT_ADAPTER), states, rows)
        write_json(run.path("divergence.json"), {name: found.to_json() for name, found in measured.items()})
        stage.note(rows=rows.name, patches=handled())


def _held_out(run: Run) -> Path:
    """Conversations that chose no checkpoint: the validation set picks the best step, and flatters the one it picked.

    Generated data has a half of its own for this. A file of conversations has none: the validation set serves, and
    the receipt's `rows` says so.
    """
    block = run.recipe.data
    if block.count is None:
        return run.path(VALIDATION_FILE)
    from qat.data.generate import conversations as generate
    from qat.data.load import save_conversations
    from qat.data.schema import load_persona

    made = generate(load_persona(run.recipe.persona), HELD_OUT_COUNT, block.seed, held_out=True)
    save_conversations(run.path(HELD_OUT_FILE), cast("list[Conversation]", made))
    return run.path(HELD_OUT_FILE)


def export(run: Run, arm: Arm) -> Path:
    """Write one arm's deployable checkpoint and prove its bytes."""
    recipe = run.recipe
    folder = f"export/{arm.name}"
    inputs = {"base": base_identity(recipe), "kind": arm.kind, "preset": arm.preset}
    needs = ["sft", *_trained_by(arm)]
    with run.stage(f"export/{arm.name}", inputs=inputs, outputs=[folder], needs=needs) as stage:
        if stage.done:
            return run.path(folder)
        from qat.export import export_checkpoint
        from qat.progress import progress_bar

        base, out, state = base_folder(recipe), run.path(folder), _quant_state(run, arm)
        adapters = [path for path in (run.path(SFT_ADAPTER), _distill_adapter(run, arm)) if path is not None]
        with progress_bar(f"export {arm.name}", 100) as progress:
            written = export_checkpoint(base, out, adapters=adapters, quant_state=state, progress=progress)
        # The exporter has read back every tensor by now; a difference is an error there.
        stage.note(**written.to_json(), patches=avoided(*AROUND["export"]))
    return run.path(folder)


def behavior(run: Run, arm: Arm, suite: Suite) -> None:
    """Serve one arm and run the suite on it; answers that are there already are not asked again."""
    recipe = run.recipe
    results = f"behavior/{arm.name}.jsonl"
    inputs = {
        "suite_sha256": suite.sha256,
        "serve": recipe.serve.model_dump(mode="json", exclude={"port", "startup_timeout_s"}),
        "behavior": recipe.behavior.model_dump(mode="json", exclude={"gate", "suite"}),
        "base": base_identity(recipe) if arm.kind == "base" else None,
    }
    needs = [] if arm.kind == "base" else [f"export/{arm.name}"]
    work = [f"behavior/{arm.name}.meta.json"]
    with run.stage(f"behavior/{arm.name}", inputs=inputs, outputs=[results], needs=needs, work=work) as stage:
        if stage.done:
            return
        from qat.behavior.runner import run_suite

        run.path("behavior").mkdir(exist_ok=True)
        with serving(run, arm) as endpoint:
            summary = run_suite(suite, endpoint.url, endpoint.model, arm.name, recipe.behavior, run.path(results))
        stage.note(**summary.to_json(), patches=avoided(*AROUND[f"serve/{recipe.serve.device}"]))


def gate(run: Run, suite: Suite) -> Verdict:
    """Judge the results; always computed, as it takes a moment, and written where it is not there yet."""
    from qat.behavior.gate import judge as judge_results
    from qat.behavior.gate import write_verdict

    recipe = run.recipe
    results = {arm.name: run.path("behavior", f"{arm.name}.jsonl") for arm in recipe.arms}
    inputs = {"gate": recipe.behavior.gate.model_dump(mode="json"), "suite_sha256": suite.sha256}
    needs = [f"behavior/{arm.name}" for arm in recipe.arms]
    with run.stage("gate", inputs=inputs, outputs=["verdict.json", "junit.xml"], needs=needs) as stage:
        verdict = judge_results(results, suite, recipe.behavior.gate)
        if not stage.done:
            write_verdict(verdict, run.path("verdict.json"), run.path("junit.xml"))
            stage.note(verdict=str(verdict.verdict))
    return verdict


def report(run: Run) -> Path:
    """Write the report on whatever is there."""
    others = {
        name: [record["status"], record["fingerprint"]] for name, record in run.stages.items() if name != "report"
    }
    with run.stage("report", inputs={"stages": others}, outputs=["report.html"]) as stage:
        if not stage.done:
            from qat.report import write_report

            write_report(run.folder)
    return run.path("report.html")


# What the stages share ------------------------------------------------------------------------------------------------


@contextmanager
def serving(run: Run, arm: Arm) -> Iterator[Endpoint]:
    """Start vLLM with one arm's checkpoint; the log lies in the run folder."""
    from qat.serve.launch import serve_checkpoint

    log = run.path("behavior", f"{arm.name}.server.log")
    log.parent.mkdir(exist_ok=True)
    with serve_checkpoint(checkpoint_of(run.folder, run.recipe, arm), serve_block(run.recipe), log) as endpoint:
        yield endpoint


def load_suite_of(recipe: Recipe) -> Suite:
    """The recipe's suite.

    Raises:
        UserError: It was written for another persona, whose prompt its cases carry.
    """
    from qat.behavior.suite import load_suite

    suite = load_suite(recipe.behavior.suite)
    if Path(suite.persona).stem != Path(recipe.persona).stem:
        raise UserError(
            f"the suite {suite.name} asks as the persona {suite.persona}",
            where="behavior.suite",
            value=f"the recipe's persona is {recipe.persona}",
            remedy="name a suite of that persona",
        )
    return suite


def serve_block(recipe: Recipe) -> ServeBlock:
    """How to serve: the recipe's block, and its chat template where it replaces the checkpoint's own."""
    template = recipe.base.chat_template
    if template is None:
        return recipe.serve
    extra = (*recipe.serve.extra_args, "--chat-template", str(Path(template).resolve()))
    return recipe.serve.model_copy(update={"extra_args": extra})


def checkpoint_of(folder: Path, recipe: Recipe, arm: Arm) -> Path:
    """The folder that vLLM serves for an arm.

    Raises:
        UserError: It is not exported yet.
    """
    if arm.kind == "base":
        return base_folder(recipe)
    checkpoint = folder / "export" / arm.name
    if not (checkpoint / "config.json").is_file():
        raise UserError(
            f"arm {arm.name} is not exported", where=str(checkpoint), remedy=f"qat export --run {folder.name}"
        )
    return checkpoint


def _trained_by(arm: Arm) -> list[str]:
    """Stages beyond fine-tuning that an arm is made from."""
    stage = {"ptq": "calibrate", "distilled": "distill"}.get(arm.kind)
    return [] if stage is None else [f"{stage}/{arm.preset}"]


def _distill_adapter(run: Run, arm: Arm) -> Path | None:
    return run.path("distill", str(arm.preset), "adapter") if arm.kind == "distilled" else None


def _quant_state(run: Run, arm: Arm) -> Path | None:
    folder = {"ptq": "calibration", "distilled": "distill"}.get(arm.kind)
    return None if folder is None else run.path(folder, str(arm.preset), "quant_state.safetensors")
