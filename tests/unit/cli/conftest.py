"""A chain whose heavy stages are stand-ins that write what the real ones promise, and note how they were called."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import qat


class Report:
    def __init__(self, **facts: Any) -> None:
        self.facts = facts
        self.faults: list[str] = facts.get("faults", [])

    def to_json(self) -> dict[str, Any]:
        return self.facts


class FakeStages:
    """What the stand-ins saw, and how they shall behave.

    Attributes:
        calls: One line per call, with the paths below the run folder.
        passing: Arm name -> share of the cases that it passes.
        trouble: Call (its first word or words) -> what happens instead.
        audit_faults: What the audit finds.
        best_step: Of distillation.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.calls: list[str] = []
        self.passing: dict[str, float] = {"base": 0.1}
        self.trouble: dict[str, Callable[[], None]] = {}
        self.audit_faults: list[str] = []
        self.best_step = 20

    def note(self, *words: object) -> None:
        line = " ".join(str(word) for word in words)
        self.calls.append(line)
        for start, happen in list(self.trouble.items()):
            if line.startswith(start):
                happen()

    def audit(self) -> Report:
        found = [{"severity": "fault", "code": "x", "message": fault, "examples": []} for fault in self.audit_faults]
        return Report(faults=self.audit_faults, findings=found)

    def train_sft(self, recipe: Any, base: Path, train: Path, held_out: Path, out: Path) -> Report:
        self.note("sft", train.name, held_out.name)
        (out / "adapter").mkdir(parents=True)
        (out / "adapter" / "weights").write_text(f"sft {recipe.train.sft.epochs}")
        return Report(loss=1.0)

    def calibrate(self, recipe: Any, preset: str, base: Path, adapter: Path, train: Path, out: Path) -> Report:
        self.note("calibrate", preset, adapter.read_bytes().decode() if adapter.is_file() else adapter.name)
        out.mkdir(parents=True)
        (out / "quant_state.safetensors").write_text(preset)
        return Report(preset=preset)

    def distill(
        self, recipe: Any, base: Path, adapter: Path, state: Path, train: Path, held: Path, out: Path
    ) -> Report:
        self.note("distill", state.parent.name, adapter.parent.name)
        (out / "adapter").mkdir(parents=True)
        (out / "quant_state.safetensors").write_text("distilled")
        return Report(kl=0.01, loop={"best_step": self.best_step})

    def measure(self, recipe: Any, base: Path, adapter: Path, arms: dict[str, Any], file: Path) -> dict[str, Report]:
        self.note("divergence", *arms)
        return {name: Report(kl=0.5 if second[0] is None else 0.125, top1=0.75) for name, second in arms.items()}

    def export_checkpoint(
        self, base: Path, out: Path, *, adapters: Any, quant_state: Any, chat_template: Path | None, progress: Any
    ) -> Report:
        inputs = [path.parent.name for path in adapters]
        self.note("export", out.name, inputs, quant_state and "/".join(quant_state.parts[-3:-1]))
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")
        if chat_template is not None:
            (out / "chat_template.jinja").write_bytes(chat_template.read_bytes())
        return Report(packed=1)

    @contextmanager
    def serve_checkpoint(self, checkpoint: Path, block: Any, log: Path) -> Iterator[Any]:
        self.note("serve", checkpoint.name)
        yield SimpleNamespace(url="http://127.0.0.1:1", model=checkpoint.name, pid=1)
        self.calls.append("stop")

    def run_suite(
        self, suite: Any, url: str, model: str, arm: str, block: Any, out: Path, *, token_ids: bool
    ) -> Report:
        self.note("suite", arm, *(["with token ids"] if token_ids else []))
        share = self.passing.get(arm, 1.0)
        lines = []
        for index, case in enumerate(suite.cases):
            passed = index < share * len(suite.cases)
            lines.append({
                "case": case.id, "category": case.category, "arm": arm, "sampling": "greedy", "seed": 0,
                "produced": [{"role": "assistant", "content": "Noted."}], "passed": passed,
                "failed_checks": [] if passed else [{"check": "no_emoji", "detail": "smile"}],
                "latency_s": 0.1, "completion_tokens": 3, "error": None,
            })  # fmt: skip
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return Report(asked=len(lines))

    def diverge(self, suite: Any, reference: Path, out: Path, url: str, model: str, block: Any) -> Report:
        self.note("diverge", out.stem, "from", reference.stem)
        if reference == out:
            out.with_suffix(".distributions.jsonl").write_text("{}\n")
        found = {"reference": reference.stem, "kl": 0.5, "top1": 0.875}
        out.with_suffix(".divergence.json").write_text(json.dumps(found))
        return Report(**found)

    def write_report(self, folder: Path) -> Path:
        self.note("report")
        (folder / "report.html").write_text("<html></html>")
        return folder / "report.html"


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    """The stand-ins, in place of the real modules; at most 40 conversations, and an empty current folder."""
    base = tmp_path / "tiny_base"
    base.mkdir()
    config = Path(qat.__file__).parent / "data" / "tiny_base" / "config.json"
    (base / "config.json").write_bytes(config.read_bytes())
    fake = FakeStages(base)
    modules: dict[str, dict[str, Any]] = {
        "qat.train.base": {"resolve_base": lambda block: base, "load_tokenizer": lambda block, folder: None},
        "qat.train.sft": {"train_sft": fake.train_sft},
        "qat.train.distill": {"distill": fake.distill},
        "qat.train.divergence": {"measure": fake.measure},
        "qat.calibration": {"calibrate": fake.calibrate},
        "qat.export": {"export_checkpoint": fake.export_checkpoint},
        "qat.serve.launch": {"serve_checkpoint": fake.serve_checkpoint},
        "qat.behavior.runner": {"run_suite": fake.run_suite},
        "qat.behavior.scoring": {"diverge": fake.diverge},
        "qat.report": {"write_report": fake.write_report},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("audit", "audit_source"):
        monkeypatch.setattr(f"qat.data.audit.{name}", lambda *arguments, **options: fake.audit())
    from qat.data import generate

    make = generate.conversations

    def few(persona: Any, count: int, seed: int, *, held_out: bool = False, joined: int = 1) -> Any:
        return make(persona, min(count, 40), seed, held_out=held_out, joined=joined)

    monkeypatch.setattr(generate, "conversations", few)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return fake
