"""The commands beside the chain: recipes, data, results, the endpoint, patches and the engine."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from qat.cli import main
from qat.recipe.load import load_recipe, recipe_names

from .conftest import FakeStages

Capture = pytest.CaptureFixture[str]


def test_version(capsys: Capture) -> None:
    import qat

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{qat.__version__}\n"


def test_recipes(capsys: Capture) -> None:
    assert main(["recipes", "list", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == recipe_names()
    assert main(["recipes", "show", "annie_tiny"]) == 0
    assert "# The demonstration" in capsys.readouterr().out  # as written, comments and all
    assert main(["recipes", "show", "annie_tiny", "--json", "--set", "seed=5"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["seed"] == 5 and shown["serve"]["port"] == 0
    assert main(["recipes", "show", "nothing"]) == 2


def test_shown_resolved_recipe_can_be_loaded(capsys: Capture, tmp_path: Path) -> None:
    assert main(["recipes", "show", "annie_tiny", "--resolved", "--set", "seed=5"]) == 0
    (tmp_path / "r.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "r.yaml") == load_recipe("annie_tiny", ["seed=5"])


def test_validate(capsys: Capture) -> None:
    assert main(["validate", "annie_tiny"]) == 0
    assert "no faults" in capsys.readouterr().out
    assert main(["validate", "--recipe", "annie_tiny", "--set", "seed=x", "--set", "arms.0.kind=y", "--json"]) == 2
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert [fault["key"] for fault in faults] == ["seed", "arms.0.kind"]
    assert main(["validate"]) == 2
    assert main(["validate", "missing.yaml"]) == 2
    assert "no such recipe file" in capsys.readouterr().err


def test_generated_file_is_that_of_the_seed(stages: FakeStages, capsys: Capture) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main(["data", "generate", f"{name}.jsonl", "--set", f"data.seed={seed}", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["conversations"] == 40
    files = [Path(f"{name}.jsonl").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    file_source = ["data.source=a.jsonl", "data.count=null", "train.distill.prompts=null"]
    assert main(["data", "generate", "x.jsonl", *(part for item in file_source for part in ("--set", item))]) == 2
    assert "reads a file" in capsys.readouterr().err


def test_audit_command(stages: FakeStages, capsys: Capture) -> None:
    assert main(["data", "generate", "a.jsonl"]) == 0
    assert main(["data", "audit", "a.jsonl"]) == 0
    stages.audit_faults = ["wrong prompt"]
    assert main(["data", "audit", "a.jsonl"]) == 1
    assert "fault: wrong prompt" in capsys.readouterr().out
    assert main(["data", "audit", "a.jsonl", "--only", "everything"]) == 2
    assert "known: schema, replies" in capsys.readouterr().err
    assert main(["data", "audit", "a.jsonl", "--accept", "no_emojis"]) == 2
    assert "did you mean 'no_emoji'?" in capsys.readouterr().err


def test_render_shows_what_is_trained(stages: FakeStages, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    words = ["<s>", "hello ", "yes ", "it is", "</s>"]
    row = SimpleNamespace(input_ids=[0, 1, 2, 3, 4], labels=[-100, -100, 2, 3, -100], dropped=3)
    tokenizer = SimpleNamespace(
        decode=lambda ids, **options: "".join(words[index] for index in ids),
        added_tokens_decoder={},
        all_special_ids=[0],
    )
    monkeypatch.setattr(sys.modules["qat.train.base"], "load_tokenizer", lambda block, folder: tokenizer)
    monkeypatch.setattr("qat.data.render.render_rows", lambda conversation, tokenizer, max_length: [row])
    assert main(["data", "generate", "a.jsonl"]) == 0
    capsys.readouterr()
    assert main(["data", "render", "a.jsonl", "--html", "page.html"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("<s>hello ⟦yes ¦it is⟧</s>\n-- 5 tokens, 2 trained (40.0%), 3 more cut off at")
    assert "<i " in Path("page.html").read_text(encoding="utf-8") and "page.html" in said
    assert main(["data", "render", "a.jsonl", "--index", "3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [piece["trained"] for piece in shown["rows"][0]["pieces"]] == [False, False, True, True, False]
    assert main(["data", "render", "a.jsonl", "--id", shown["id"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == shown
    assert main(["data", "render", "a.jsonl", "--index", "40"]) == 2
    assert "0 to 39" in capsys.readouterr().err
    assert main(["data", "render", "a.jsonl", "--id", "nobody"]) == 2
    assert "no such conversation" in capsys.readouterr().err


def test_generate_out_of_failures(stages: FakeStages, capsys: Capture) -> None:
    stages.passing = {"bf16": 0.5}
    assert main(["run", "--recipe", "annie_tiny"]) in (0, 1, 3)
    capsys.readouterr()
    results = "runs/annie_tiny/behavior/bf16.jsonl"
    assert main(["data", "generate", "again.jsonl", "--failures", results, "--per-case", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failures"] == 60 and report["conversations"] == report["made"] == 120 and report["complete"]
    assert report["checks"] == {"no_emoji": 60}
    first = Path("again.jsonl").read_bytes()
    assert main(["data", "generate", "again.jsonl", "--failures", results, "--per-case", "2"]) == 0
    assert Path("again.jsonl").read_bytes() == first
    assert main(["data", "generate", "again.jsonl", "--failures", "missing.jsonl"]) == 2


def test_generate_by_a_teacher(stages: FakeStages, capsys: Capture) -> None:
    from tests.unit.behavior.stub_server import serving
    from tests.unit.data.teaching import by_parts

    with serving(by_parts()) as stub:
        settings = f"url: {stub.url}\nmodel: m\nconcurrency: 1\ncategories: {{concise_voice: {{count: 2}}}}\n"
        Path("teacher.yaml").write_text(settings + "limits: {requests: 3}\n")
        command = ["data", "generate", "t.jsonl", "--teacher", "teacher.yaml", "--json"]
        assert main(command) == 1  # the limit came first
        report = json.loads(capsys.readouterr().out)
        assert report["made"] == {"concise_voice": 1} and "limits.requests" in report["stopped"]
        Path("teacher.yaml").write_text(settings)
        assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["made"] == {"concise_voice": 2}
    assert len(Path("t.jsonl").read_text().splitlines()) == 2


def test_compare(stages: FakeStages, capsys: Capture) -> None:
    assert main(["run", "--recipe", "annie_tiny"]) == 0
    capsys.readouterr()
    assert main(["compare", "base", "bf16", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["comparisons"][0]
    assert entry["difference"] == pytest.approx(-0.9)  # the stand-in passes 12 of 120 as base, all as bf16
    assert (len(entry["flips_worse"]), len(entry["flips_better"])) == (108, 0)
    assert main(["compare", "runs/annie_tiny/behavior/bf16.jsonl", "base"]) == 0
    assert "+90.0" in capsys.readouterr().out
    assert main(["compare", "base", "nothing"]) == 2
    assert "arms with results: base, bf16" in capsys.readouterr().err
    assert main(["compare", "missing.jsonl", "base"]) == 2


def test_serve_names_what_it_can(stages: FakeStages, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, int]] = []

    def command(checkpoint: Path, block: Any, port: int) -> Any:
        started.append((checkpoint.name, port))
        return SimpleNamespace(argv=["vllm"], env={"A": "1"}, shell=lambda: "env A=1 vllm")

    launch = sys.modules["qat.serve.launch"]
    monkeypatch.setattr(launch, "build_command", command, raising=False)
    monkeypatch.setattr(launch, "choose_port", lambda port: port or 7000, raising=False)
    assert main(["train", "--recipe", "annie_tiny"]) == 0
    assert main(["serve", "--dry-run"]) == 2
    assert "arm nvfp4_all_qad is not exported" in capsys.readouterr().err
    assert main(["export"]) == 0
    capsys.readouterr()
    assert main(["serve", "--dry-run"]) == 0
    assert capsys.readouterr().out == "env A=1 vllm\n"
    assert main(["serve", "--dry-run", "--arm", "bf16", "--port", "8000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"argv": ["vllm"], "env": {"A": "1"}}
    assert main(["serve", "some/folder", "--dry-run"]) == 0
    assert started == [("nvfp4_all_qad", 7000), ("bf16", 8000), ("folder", 7000)]
    assert main(["serve", "--arm", "nope"]) == 2
    assert "arms: base, bf16" in capsys.readouterr().err
    assert main(["serve", "some/folder", "--arm", "bf16"]) == 2


def test_serve_until_interrupted(stages: FakeStages, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = sys.modules["qat.serve.launch"]
    monkeypatch.setattr(launch, "build_command", None, raising=False)
    monkeypatch.setattr(launch, "choose_port", None, raising=False)
    polls = iter([[1], [1], []])
    registry = ModuleType("qat.serve.registry")

    def running() -> list[Any]:
        alive = next(polls, None)
        if alive is None:
            raise KeyboardInterrupt
        return [SimpleNamespace(pid=pid) for pid in alive]

    vars(registry)["running"] = running
    monkeypatch.setitem(sys.modules, "qat.serve.registry", registry)
    monkeypatch.setattr("qat.commands.endpoint._POLL_S", 0.0)
    endpoint = SimpleNamespace(url="http://h:1", model="m", pid=1, curl=lambda: "curl x", _asdict=lambda: {"pid": 1})

    class Serving:
        def __init__(self, *arguments: object) -> None: ...

        def __enter__(self) -> Any:
            return endpoint

        def __exit__(self, *arguments: object) -> None:
            stages.calls.append("stop")

    monkeypatch.setattr(launch, "serve_checkpoint", Serving)
    assert main(["serve", "folder"]) == 2  # the server ended by itself
    captured = capsys.readouterr()
    assert "http://h:1/v1" in captured.out and "curl x" in captured.out and "ended by itself" in captured.err
    assert main(["serve", "folder"]) == 130
    assert stages.calls == ["stop", "stop"]


class Handler(BaseHTTPRequestHandler):
    seen: list[Any]
    answers: list[Any]

    def reply(self, body: Any, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode() if status == 200 else b"not today")

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        type(self).seen.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        answer = type(self).answers.pop(0)
        self.reply({"choices": [{"message": answer}]} if answer else {}, 200 if answer else 500)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def server() -> Iterator[tuple[str, type[Handler]]]:
    handler = type("Own", (Handler,), {"seen": [], "answers": []})
    with HTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", handler
        listening.shutdown()


def test_chat_once(server: tuple[str, type[Handler]], capsys: Capture) -> None:
    from qat.data.schema import load_persona

    url, handler = server
    call = {"id": "c1", "type": "function", "function": {"name": "save_note", "arguments": '{"text": "x"}'}}
    handler.answers += [{"content": "Hi.", "tool_calls": None}, {"content": None, "tool_calls": [call]}, None]
    assert main(["chat", "hello", "--url", f"{url}/v1/", "--persona", "annie_tiny"]) == 0
    assert capsys.readouterr().out == "Hi.\n"
    persona = load_persona("annie_tiny")
    sent = handler.seen[0]
    assert sent["messages"][0] == {"role": "system", "content": persona.system_prompt}
    assert (sent["model"], sent["tools"], sent["temperature"]) == ("tiny", persona.tools, 0.0)
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert main(["chat", "hello", "--url", url, "--persona", "annie_tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tool_calls"] == [call]
    assert main(["chat", "hello", "--url", url, "--persona", "annie_tiny"]) == 2
    assert "HTTP 500" in capsys.readouterr().err


def test_conversation_with_a_tool(
    server: tuple[str, type[Handler]], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = server
    call = {"id": "c1", "type": "function", "function": {"name": "search_memory", "arguments": "{}"}}
    handler.answers += [{"content": "", "tool_calls": [call]}, {"content": "Nothing yet."}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("do you remember?\n[]\n\n"))
    assert main(["chat", "--url", url, "--persona", "annie_tiny"]) == 0
    assert capsys.readouterr().out == "-> search_memory({})\nNothing yet.\n"
    roles = [message["role"] for message in handler.seen[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "tool"]
    assert handler.seen[-1]["messages"][-1] == {"role": "tool", "tool_call_id": "c1", "content": "[]"}


def test_chat_without_a_server(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["chat", "hello", "--persona", "annie_tiny"]) == 2
    assert "no server runs" in capsys.readouterr().err
    assert main(["chat", "hello", "--url", "http://127.0.0.1:9", "--persona", "annie_tiny"]) == 2
    assert "cannot be reached" in capsys.readouterr().err


def test_engine(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("QAT_ENGINE", str(tmp_path / "nowhere"))
    assert main(["engine", "status", "--json"]) == 1
    status = json.loads(capsys.readouterr().out)
    assert status["installed"] is False and status["folder"].endswith("nowhere") and status["servers"] == []
    assert main(["engine", "stop"]) == 0
    assert "no server runs" in capsys.readouterr().out
    assert main(["engine", "logs"]) == 0


def test_env(capsys: Capture) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory_gb"] > 0 and "pydantic" in found["packages"]
    assert main(["env"]) == 0
