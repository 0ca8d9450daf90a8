"""The commands of the chain: order, resumption, exit codes, what is printed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qat.cli import main
from qat.errors import UserError
from qat.recipe.load import load_recipe
from qat.runs import Run

from .conftest import FakeStages

TRAIN = [
    "sft train.jsonl validation.jsonl",
    "calibrate all adapter",
    "distill all sft",
    "divergence nvfp4_all_ptq nvfp4_all_qad",
]
EXPORT = [
    "export bf16 ['sft'] None",
    "export nvfp4_all_ptq ['sft'] calibration/all",
    "export nvfp4_all_qad ['sft', 'all'] distill/all",
]
ARMS = ["base", "bf16", "nvfp4_all_ptq", "nvfp4_all_qad"]
TESTED = ["bf16", "base", *ARMS[2:]]  # the reference first
TEST = [
    *("serve bf16", "suite bf16 with token ids", "diverge bf16 from bf16", "stop"),
    *("serve tiny_base", "suite base", "stop"),
    *("serve nvfp4_all_ptq", "suite nvfp4_all_ptq", "diverge nvfp4_all_ptq from bf16", "stop"),
    *("serve nvfp4_all_qad", "suite nvfp4_all_qad", "diverge nvfp4_all_qad from bf16", "stop"),
]
RUN = Path("runs/annie_tiny")


def status() -> dict[str, str]:
    stages = json.loads((RUN / "receipt.json").read_text())["stages"]
    return {name: record["status"] for name, record in stages.items()}


def verdict_files() -> list[bytes]:
    return [(RUN / name).read_bytes() for name in ("verdict.json", "junit.xml", "divergence.json")]


def test_run_does_everything_in_order_once(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--recipe", "annie_tiny"]) == 0
    assert stages.calls == [*TRAIN, *EXPORT, *TEST, "report"]
    assert set(status().values()) == {"done"}
    assert list(status()) == [
        "data", "sft", "calibrate/all", "distill/all", "divergence", *(f"export/{arm}" for arm in ARMS[1:]),
        *(f"behavior/{arm}" for arm in TESTED), "gate", "report",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "verdict: PASS" in printed
    row = next(line for line in printed.splitlines() if line.startswith("nvfp4_all_qad"))
    assert "100.0 % (120/120)" in row and "0.1250" in row and "0.750" in row
    assert "KL, suite" in printed and "0.5000" in row and "0.875" in row
    base = next(line for line in printed.splitlines() if line.startswith("base"))
    assert "10.0 % (12/120)" in base and "-90.0" in base
    before = verdict_files()
    stages.calls.clear()
    assert main(["run", "--recipe", "annie_tiny"]) == 0
    assert stages.calls == []
    assert "verdict: PASS" in capsys.readouterr().out
    assert verdict_files() == before
    assert main(["run", "--recipe", "annie_tiny", "--fresh"]) == 0
    assert stages.calls == [*TRAIN, *EXPORT, *TEST, "report"]


def test_parts_one_after_another_are_the_same_run(stages: FakeStages) -> None:
    assert main(["train", "--recipe", "annie_tiny"]) == 0
    assert main(["export", "--format", "nvfp4"]) == 0
    assert main(["export", "--format", "bf16"]) == 0
    assert main(["test"]) == 0
    assert stages.calls == [*TRAIN, *EXPORT[1:], EXPORT[0], *TEST, "report"]
    before = verdict_files()
    stages.calls.clear()
    assert main(["run"]) == 0  # the latest run, nothing left to do (the order of the exports is no difference)
    assert [call for call in stages.calls if call != "report"] == []
    assert verdict_files() == before


def test_data_of_the_run(stages: FakeStages) -> None:
    from qat.data.load import load_conversations

    assert main(["train", "--recipe", "annie_tiny"]) == 0
    training, held_out = (load_conversations(RUN / "data" / f"{name}.jsonl") for name in ("train", "validation"))
    assert (len(training), len(held_out)) == (36, 4)
    assert not {item["id"] for item in held_out} & {item["id"] for item in training}
    files = sorted(path.name for path in (RUN / "data").iterdir())
    assert files == ["audit.json", "held_out.jsonl", "train.jsonl", "validation.jsonl"]


def test_changed_recipe_reruns_what_depends_on_it(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--recipe", "annie_tiny"]) == 0
    stages.calls.clear()
    assert main(["run", "--recipe", "annie_tiny", "--set", "train.distill.max_steps=5"]) == 0
    qad = [TRAIN[2], TRAIN[3], EXPORT[2], *TEST[-4:], "report"]
    assert stages.calls == qad
    assert "train.distill.max_steps (60 -> 5)" in capsys.readouterr().err
    capsys.readouterr()
    stages.calls.clear()
    assert main(["test", "--set", "behavior.gate.pass_floor=0.99", "--json"]) == 3  # 120 of 120 do not prove 99 %
    assert stages.calls == ["report"]
    assert json.loads(capsys.readouterr().out)["verdict"] == "INCONCLUSIVE"


def test_other_data_trains_again(stages: FakeStages) -> None:
    assert main(["run", "--recipe", "annie_tiny"]) == 0
    stages.calls.clear()
    assert main(["run", "--set", "data.seed=12"]) == 0
    unchanged = ["serve tiny_base", "suite base"]  # the base has not seen the data
    assert [call for call in stages.calls if call != "stop"] == [
        call for call in [*TRAIN, *EXPORT, *TEST, "report"] if call not in unchanged and call != "stop"
    ]


def test_verdicts_are_exit_codes(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    stages.passing["nvfp4_all_qad"] = 0.5
    assert main(["run", "--recipe", "annie_tiny"]) == 1
    printed = capsys.readouterr().out
    assert "verdict: FAIL" in printed and "50.0 % (60/120)" in printed


def test_user_error_is_one_message(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise UserError("the disk is full", where="export", remedy="free some space")

    stages.trouble["export nvfp4_all_ptq"] = refuse
    assert main(["run", "--recipe", "annie_tiny"]) == 2
    message = capsys.readouterr().err
    assert "error: the disk is full\n  where:  export\n  remedy: free some space" in message
    assert "Traceback" not in message
    assert status()["export/nvfp4_all_ptq"] == "failed" and "behavior/base" not in status()
    stages.trouble.clear()
    stages.calls.clear()
    assert main(["run", "--recipe", "annie_tiny"]) == 0
    assert stages.calls == [*EXPORT[1:], *TEST, "report"]


def test_bug_keeps_its_traceback(stages: FakeStages) -> None:
    stages.trouble["sft"] = lambda: {}["missing"]
    with pytest.raises(KeyError):
        main(["run", "--recipe", "annie_tiny"])
    assert status()["sft"] == "failed"


def _interrupt() -> None:
    raise KeyboardInterrupt


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("end", [_interrupt, _terminate])
@pytest.mark.parametrize("stage", ["sft", "distill", "divergence", "export bf16", "serve bf16", "suite bf16", "report"])
def test_interrupted_anywhere_and_resumed(
    stages: FakeStages, capsys: pytest.CaptureFixture[str], stage: str, end: Any
) -> None:
    stages.trouble[stage] = end
    assert main(["run", "--recipe", "annie_tiny", "--fresh", "--set", "seed=3"]) == 130
    message = capsys.readouterr().err
    assert message.endswith("interrupted; resume with: qat run --recipe annie_tiny --set seed=3\n")
    assert "interrupted" in status().values() and "running" not in status().values()
    before = list(stages.calls)
    stages.trouble.clear()
    stages.calls.clear()
    assert main(["run", "--recipe", "annie_tiny", "--set", "seed=3"]) == 0
    assert set(status().values()) == {"done"}
    done_before = [call for call in before[:-1] if call.startswith(("sft", "calibrate", "distill", "export"))]
    assert not set(done_before) & set(stages.calls)  # nothing is done twice
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_audit_faults_stop_before_training(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    stages.audit_faults = ["another system prompt", "emoji"]
    assert main(["run", "--recipe", "annie_tiny"]) == 2
    assert "2 faults" in capsys.readouterr().err and stages.calls == []
    assert json.loads((RUN / "data" / "audit.json").read_text())["faults"] == stages.audit_faults


def test_parts_out_of_order(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "export", "test", "report", "run"):
        assert main([command]) == 2
        assert "no run yet" in capsys.readouterr().err
    assert main(["train", "--recipe", "annie_tiny"]) == 0
    assert main(["test"]) == 2
    assert "behavior/bf16 needs export/bf16, which is not done" in capsys.readouterr().err
    assert main(["export", "--run", "other"]) == 2
    assert "runs here: annie_tiny" in capsys.readouterr().err
    assert main(["report"]) == 0  # works on what is there


def test_busy_run(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.open(load_recipe("annie_tiny")):
        assert main(["run", "--recipe", "annie_tiny"]) == 2
    assert f"process {os.getpid()}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--recipe", "nope"], ["--set", "seed=x"], ["--set", "seed"], ["--run", "../x"]])
def test_bad_options(stages: FakeStages, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    given = arguments if "--recipe" in arguments else ["--recipe", "annie_tiny", *arguments]
    assert main(["run", *given]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not Path("runs").exists() and stages.calls == []


def test_json_stands_alone_on_standard_output(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["train", "--recipe", "annie_tiny"],
        ["export"],
        ["test"],
        ["report"],
        ["run"],
        ["compare", "base", "bf16"],
    ):
        assert main([*command, "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict), command


def test_suite_of_another_persona(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--recipe", "annie_tiny", "--set", "arms=[{name: a, kind: base}, {name: b, kind: persona}]",
                 "--set", "behavior.gate={candidate: b, reference: a}"]) == 0  # fmt: skip
    text = "name: x\nversion: '1'\npersona: annie\ncases:\n  - id: a\n    category: no_emoji_no_markdown\n"
    Path("x.yaml").write_text(text + "    messages: [{role: user, content: hi}]\n    checks: [{check: no_emoji}]\n")
    assert main(["export"]) == 0
    assert main(["test", "--set", "behavior.suite=x.yaml"]) == 2
    assert "asks as the persona annie" in capsys.readouterr().err


def test_chat_template_of_the_recipe_reaches_the_server(stages: FakeStages) -> None:
    from qat.chain import serve_block

    Path("t.jinja").write_text("x")
    recipe = load_recipe("annie_tiny", ["base.chat_template=t.jinja", "serve.extra_args=[--a]"])
    assert serve_block(recipe).extra_args == ("--a", "--chat-template", str(Path("t.jinja").resolve()))


def test_chat_template_of_the_recipe_is_exported(stages: FakeStages) -> None:
    """Whoever serves the checkpoint by other means than `qat serve` gets the template that was trained with."""
    Path("t.jinja").write_text("{{ messages }}")
    given = ["--set", "base.chat_template=t.jinja"]
    assert main(["run", "--recipe", "annie_tiny", *given]) in (0, 1, 3)
    exported = sorted(Path("runs/annie_tiny/export").glob("*/chat_template.jinja"))
    assert [path.parent.name for path in exported] == ["bf16", "nvfp4_all_ptq", "nvfp4_all_qad"]
    assert {path.read_text() for path in exported} == {"{{ messages }}"}


def test_a_distillation_that_mended_nothing_says_so(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--recipe", "annie_tiny"]) == 0
    assert "no step came below" not in capsys.readouterr().err
    stages.best_step = 0
    assert main(["train", "--recipe", "annie_tiny", "--fresh"]) == 0
    assert "[distill/all] no step came below plain NVFP4" in capsys.readouterr().err


def test_replies_from_a_file_are_audited_and_followed(
    stages: FakeStages, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qat.data.generate import conversations
    from qat.data.load import save_conversations
    from qat.data.schema import load_persona

    replies, settings = Path("replies.jsonl"), ["--set", "train.distill.replies={file: replies.jsonl}"]
    save_conversations(replies, conversations(load_persona("annie_tiny"), 4, 1))
    assert main(["train", "--recipe", "annie_tiny", *settings]) == 0
    stages.calls.clear()
    assert main(["train", *settings]) == 0 and stages.calls == []
    save_conversations(replies, conversations(load_persona("annie_tiny"), 4, 2))
    stages.audit_faults = ["another system prompt"]
    assert main(["train", *settings]) == 2
    assert "replies.audit.json" in capsys.readouterr().err and stages.calls == []
    stages.audit_faults = []
    assert main(["train", *settings]) == 0
    assert stages.calls == TRAIN[2:]


def test_memory_is_given_back_before_a_network_is_loaded(stages: FakeStages, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch caches of a 30B model after fine-tuning leaves no room for the next one."""
    cuda = SimpleNamespace(is_initialized=lambda: True, empty_cache=lambda: stages.note("emptied"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert main(["train", "--recipe", "annie_tiny"]) == 0
    assert stages.calls == [TRAIN[0], *(call for stage in TRAIN[1:] for call in ("emptied", stage))]
