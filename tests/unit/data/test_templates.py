"""Templates in bounds: hostile ones stop, what they can do is told rightly, and Transformers renders the same."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qat.data import templates
from qat.data.render import render
from qat.data.template_table import page, rows, templates_in
from qat.data.templates import Rendering, Survey, check_template, render_template, require_bounded, survey
from qat.errors import UserError

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TOOLS = "{{ tools|tojson if tools else '' }}"
# How a call is written: what {} stands for is the arguments.
CALLING = (
    TOOLS + "{%% for m in messages %%}{{ m.role }}: {{ m.content }}{%% for c in m.tool_calls or [] %%}"
    "<{{ c.function.name }}>%s</>{%% endfor %%}\n{%% endfor %%}"
)
ITERATED = CALLING % "{% for k, v in c.function.arguments|items %}{{ k }}={{ v }} {% endfor %}"
DUMPED = CALLING % "{{ c.function.arguments|tojson }}"
PRINTED = CALLING % "{{ c.function.arguments }}"
EITHER = CALLING % "{% set a = c.function.arguments %}{{ a if a is string else a|tojson }}"
ADDED = CALLING % "{{ 'arguments: ' + c.function.arguments }}"
HTML = CALLING % """{{ '{"arguments": ' + c.function.arguments|tojson|safe }}"""
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (LOOP, "does not end: stopped after 1 s of processor time"),
        ("{{ 10 ** (10 ** 9) }}", "does not end"),  # one instruction, which no thread could interrupt
        ("{{ 'x' * 10 ** 10 }}", "writes without end: more memory"),
        ("{% for i in range(99999) %}{{ 'xxxxxxxxxxxxxxxx' }}{% endfor %}", "writes without end: more than 1000000"),
        ("{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}", "more memory"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be compiled: RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError: access to attribute '__init__'"),
        ("{{ messages.append(1) }}", "SecurityError: access to attribute 'append'"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% if %}", "is no valid Jinja: TemplateSyntaxError"),
        ("x" * 1_000_001, "is too long: 1000001 characters"),
        ("", "leaves out the system, user, assistant message"),
        ("\ud800", "leaves out"),
    ],
)
def test_hostile_templates_stop(monkeypatch: pytest.MonkeyPatch, template: str, problem: str) -> None:
    monkeypatch.setattr(templates, "CPU_SECONDS", 1)
    templates._refusal.cache_clear()
    start = time.monotonic()
    problems = check_template(template)
    assert len(problems) == 1 and problem in problems[0]
    assert time.monotonic() - start < 20
    templates._refusal.cache_clear()


def test_a_format_string_reaches_no_attribute() -> None:
    [rendering] = render_template("{{ '{0.__class__.__mro__}'.format(1) }}", [{}])
    assert "object" not in rendering.text


def test_a_crash_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(templates, "_WORKER", worker)
    with pytest.raises(UserError, match="crashes its process") as caught:
        render_template("x", [{}])
    assert caught.value.value == "SIGSEGV"
    worker.write_text("raise SystemExit('broken')")
    with pytest.raises(RuntimeError, match="broken"):
        render_template("x", [{}])


def test_the_limits_are_the_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A standing still process is stopped too."""
    worker = tmp_path / "worker.py"
    worker.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(templates, "_WORKER", worker)
    monkeypatch.setattr(templates, "_WALL_SECONDS", 0.5)
    with pytest.raises(UserError, match="does not end"):
        render_template("x", [{}])


def test_marks_and_errors_by_hand() -> None:
    template = "{{ a }}{% generation %}{{ b }}{% endgeneration %}!{% if c %}{{ raise_exception('no') }}{% endif %}"
    assert render_template(template, [{"a": "ab", "b": "cde"}, {"c": True}, {"a": "", "b": ""}]) == [
        Rendering("abcde!", [(2, 5)], ""),
        Rendering("", [], "TemplateError: no"),
        Rendering("!", [(0, 0)], ""),
    ]


@pytest.mark.parametrize(
    ("template", "mapping", "string", "reason"),
    [
        (ITERATED, "", "TypeError: Can only get item pairs from a mapping.", ""),
        (DUMPED, "", r'writes the arguments as a quoted string, "{\"city\": …}"', ""),
        (EITHER, "", "", ""),
        (PRINTED, "Python dictionary", "", "takes JSON strings only, and vLLM passes mappings"),
        (ADDED, "TypeError", "", "takes JSON strings only"),
        (HTML, "&#34;", "&#34;", "&#34;"),
        (CHATML, "leaves out the tools", "leaves out the tools", "leaves out the tools"),
        (TOOLS + CHATML, "leaves out the call", "leaves out the call", "leaves out the call"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}",
            "No system",
            "No system",
            "No system",
        ),
        (
            TOOLS + "{% for m in messages if m.role != 'tool' %}{{ m.content ~ m.tool_calls|default('')|tojson }}"
            "{% endfor %}",
            "leaves out the tool's result",
            "quoted",
            "leaves out the tool's result",
        ),
        # Wrong without a sign of it: the keys in bare letters for a mapping, JSON in braces for a string.
        (
            CALLING % "{% set a = c.function.arguments %}{{ '{' }}{% if a is mapping %}city:{{ a.city }}{% else %}"
            "{{ a }}{% endif %}{{ '}' }}",
            "",
            "writes another text than for a mapping",
            "",
        ),
    ],
)
def test_what_a_template_does_with_arguments(template: str, mapping: str, string: str, reason: str) -> None:
    found = survey(template)
    for fault, expected in ((found.mapping, mapping), (found.string, string), (found.reason, reason)):
        assert expected in fault and bool(expected) == bool(fault)
    assert found.normalised == found.mapping
    of = "a plain conversation" if "No system" in reason else "tools"
    assert check_template(template) == ([f"{of}: {found.reason}"] if reason else [])


def test_a_problem_with_tools_alone_says_so() -> None:
    assert check_template(CHATML) == ["tools: leaves out the tools"]


THINKING = (
    "{{% for m in messages %}}<{{{{ m.role }}}}>{{% if m.role == 'assistant' %}}{}{{% endif %}}{{{{ m.content if"
    " m.role != 'assistant' else '' }}}}\n{{% endfor %}}{{% if add_generation_prompt %}}<assistant>{}{{% endif %}}"
)
MARKED = "{% generation %}{{ m.content }}{% endgeneration %}"
WITH_BLOCK = "{% generation %}<think>\n\n</think>{{ m.content }}{% endgeneration %}"


@pytest.mark.parametrize(
    ("reply", "prompt", "marked", "empty_think"),
    [
        ("{{ m.content }}", "", False, False),
        (MARKED, "", True, False),
        ("<think>\n\n</think>" + MARKED, "<think>\n\n</think>", True, False),
        (WITH_BLOCK, "<think>\n\n</think>", True, True),
        (WITH_BLOCK, "", True, False),  # the server does not write the block: the model has to
        ("{{ m.content }}{% generation %}{% endgeneration %}", "", False, False),
    ],
)
def test_marks_and_the_empty_think_block(reply: str, prompt: str, marked: bool, empty_think: bool) -> None:
    template = THINKING.format(reply, prompt)
    found = survey(template)
    assert (found.marked, found.empty_think) == (marked, empty_think)
    assert templates.marks_empty_think(template) == empty_think


def test_training_asks_first(
    monkeypatch: pytest.MonkeyPatch, tokenizer_of: Callable[..., Any], tool_conversation: Any
) -> None:
    monkeypatch.setattr(templates, "CPU_SECONDS", 1)
    tokenizer = tokenizer_of(LOOP, ("<|im_end|>",))
    with pytest.raises(UserError, match="does not end"):
        render(tool_conversation, tokenizer)
    start = time.monotonic()
    with pytest.raises(UserError, match="does not end"):
        require_bounded(LOOP)
    assert time.monotonic() - start < 0.5, "a template is tried once"


def test_training_refuses_html(tokenizer_of: Callable[..., Any], tool_conversation: Any) -> None:
    template = HTML.replace("\\n", "<|im_end|>") + "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(UserError, match=r"writes &#34; for quotes"):
        render(tool_conversation, tokenizer_of(template.replace("\n", "<|im_end|>"), ("<|im_end|>",)))
    tool_conversation["messages"][1]["content"] = "What is &#34;?"
    good = DUMPED.replace("\n", "<|im_end|>") + "{% if add_generation_prompt %}assistant: {% endif %}"
    render(tool_conversation, tokenizer_of(good, ("<|im_end|>",)))


def test_a_page_of_templates(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "dumped.jinja").write_text(DUMPED)
    (tmp_path / "endless.jinja").write_text("{% if %}")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "default", "template": CHATML}, {"name": "tools", "template": EITHER}]})
    )
    found = templates_in(tmp_path)
    assert found == {
        "a/dumped.jinja": DUMPED,
        "endless.jinja": "{% if %}",
        "tokenizer_config.json#default": CHATML,
        "tokenizer_config.json#tools": EITHER,
    }
    lines = page(rows(found)).splitlines()
    assert lines[0].startswith("4 templates. 3 render a plain conversation, 2 a tool conversation")
    assert "of the 2, 1 then write a wrong text" in lines[0]
    assert lines[4] == "| `a/dumped.jinja` | yes | yes | wrong | yes | – |  |  |"
    assert lines[5].startswith("| `endless.jinja` | – | – | – | – | – | – | The chat template is no valid Jinja")
    assert lines[6] == "| `tokenizer_config.json#default` | yes | – | – | – | – |  | leaves out the tools |"
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no chat template"):
        templates_in(tmp_path / "none")


def by_transformers(template: str, request: dict[str, Any]) -> Rendering:
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = {key: value for key, value in request.items() if key not in ("messages", "tools", "documents")}
    try:
        texts, spans = render_jinja_template(
            [request["messages"]],
            tools=request["tools"],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **variables,
        )
    except Exception as error:
        return Rendering("", [], f"{type(error).__name__}: {error}"[:500])
    return Rendering(texts[0], spans[0], "")


def requests() -> list[dict[str, Any]]:
    return [
        *(templates._request(turns) for turns in (templates._TURNS, templates._TURNS[:1])),
        templates._request(templates._TURNS[:2], prompt=True),
        templates._request(templates._calling(templates._ARGUMENTS), tools=True),
        templates._request(templates._calling('{"city": "Mysuru"}'), tools=True),
        templates._request(templates._calling({"city": "ಮೈಸೂರು <&>", "days": [3, None, 0.5]}), tools=True),
    ]


def assert_like_transformers(template: str) -> None:
    for ours, request in zip(render_template(template, requests()), requests(), strict=True):
        theirs = by_transformers(template, request)
        assert (ours.text, ours.spans) == (theirs.text, theirs.spans)
        assert ours.error[:200] == theirs.error[:200]


@pytest.mark.parametrize("template", [ITERATED, DUMPED, HTML, THINKING.format(MARKED, "<think></think>")])
def test_transformers_renders_the_same(template: str) -> None:
    assert_like_transformers(template)


@pytest.mark.slow
def test_transformers_renders_real_templates_the_same(real: Path) -> None:
    compared = 0
    for text in templates_in(real).values():
        if "strftime_now" not in text:  # the date, which may change between the two
            assert_like_transformers(text)
            compared += 1
    assert compared > 150


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("trl/nemotron_3_nano", Survey("", "", "TypeError: Can only get item pairs from a mapping.", "", False, False)),
        (
            "trl/nemotron_3_nano_training",
            Survey("", "", "TypeError: Can only get item pairs from a mapping.", "", True, True),
        ),
        (
            "llamacpp/Qwen-Qwen2.5-7B-Instruct",
            Survey("", "", r'writes the arguments as a quoted string, "{\"city\": …}"', "", False, False),
        ),
    ],
)
def test_real_templates(real: Path, name: str, expected: Survey) -> None:
    folder, file = name.split("/")
    assert survey((real / f"chat_templates_{folder}" / f"{file}.jinja").read_text()) == expected


@pytest.mark.slow
def test_every_real_template_renders_a_tool_conversation_or_says_why(real: Path) -> None:
    import importlib.util

    root = Path(__file__).resolve().parents[3]
    spec = importlib.util.spec_from_file_location("check_templates", root / "scripts" / "check_templates.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.render(real)
    assert text == script.TARGET.read_text(), "run scripts/check_templates.py"
    table = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.startswith("| `chat")]
    assert len(table) > 150
    for cells in table:
        assert cells[4] == "yes" or len(cells[7].strip("| ")) > 10, cells
