"""The second half of the chain: from what was trained to a verdict. Each stage reads the folder of the stage before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qat.artifacts import distilled, fine_tuned, quant_state, trained_by
from qat.errors import UserError
from qat.inputs import base_folder, base_identity
from qat.patches.registry import avoided
from qat.patches.stages import AROUND
from qat.recipe.schema import Arm, Recipe, ServeBlock
from qat.runs import Run

if TYPE_CHECKING:
    from qat.behavior.gate import Verdict
    from qat.behavior.suite import Suite
    from qat.serve.launch import Endpoint


def export(run: Run, arm: Arm) -> Path:
    """Write one arm's deployable checkpoint and prove its bytes."""
    recipe = run.recipe
    folder = f"export/{arm.name}"
    inputs = {"base": base_identity(recipe), "kind": arm.kind, "preset": arm.preset}
    needs = ["sft", *trained_by(arm)]
    with run.stage(f"export/{arm.name}", inputs=inputs, outputs=[folder], needs=needs) as stage:
        if stage.done:
            return run.path(folder)
        from qat.export import export_checkpoint
        from qat.progress import progress_bar

        base, out, state = base_folder(recipe), run.path(folder), quant_state(run, arm)
        adapters = [path for path in (fine_tuned(run), distilled(run, arm)) if path is not None]
        if recipe.train.trains == "all":  # what was trained is a base of its own, nothing is left to merge
            base, adapters = adapters[-1], []
        template = None if recipe.base.chat_template is None else Path(recipe.base.chat_template)
        with progress_bar(f"export {arm.name}", 100) as progress:
            written = export_checkpoint(
                base, out, adapters=adapters, quant_state=state, chat_template=template, progress=progress
            )
        # The exporter has read back every tensor by now; a difference is an error there.
        stage.note(**written.to_json(), patches=avoided(*AROUND["export"]))
    return run.path(folder)


def behavior(run: Run, arm: Arm, suite: Suite) -> None:
    """Serve one arm and run the suite on it; answers that are there already are not asked again.

    The arm is also compared, token by token, with the gate's reference on the reference's replies: the reference first.
    The untuned base is not: it differs by what was taught.
    """
    recipe, reference = run.recipe, run.recipe.behavior.gate.reference
    own = arm.name == reference
    scored = recipe.behavior.divergence_cases > 0 and (own or arm.kind != "base")
    results = f"behavior/{arm.name}.jsonl"
    outputs = [results]
    if scored:
        outputs.append(f"behavior/{arm.name}.divergence.json")
    if scored and own:
        outputs.append(f"behavior/{arm.name}.distributions.jsonl")
    inputs = {
        "suite_sha256": suite.sha256,
        "serve": recipe.serve.model_dump(mode="json", exclude={"port", "startup_timeout_s"}),
        "behavior": recipe.behavior.model_dump(mode="json", exclude={"gate", "suite"}),
        "base": base_identity(recipe) if arm.kind == "base" else None,
        "divergence": [reference, recipe.behavior.gate.sampling] if scored else None,
    }
    needs = [] if arm.kind == "base" else [f"export/{arm.name}"]
    if scored and not own:
        needs.append(f"behavior/{reference}")
    work = [f"behavior/{arm.name}.meta.json"]
    with run.stage(f"behavior/{arm.name}", inputs=inputs, outputs=outputs, needs=needs, work=work) as stage:
        if stage.done:
            return
        from qat.behavior.runner import run_suite
        from qat.behavior.scoring import diverge

        run.path("behavior").mkdir(exist_ok=True)
        block, out = recipe.behavior, run.path(results)
        with serving(run, arm) as endpoint:
            url, model = endpoint.url, endpoint.model
            summary = run_suite(suite, url, model, arm.name, block, out, token_ids=scored and own)
            if scored:
                found = diverge(suite, run.path("behavior", f"{reference}.jsonl"), out, url, model, block)
                stage.note(divergence=found.to_json())
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
