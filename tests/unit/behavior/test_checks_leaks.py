"""Hand-labelled replies for leaks, and what the chat templates of many vendors really write for a tool call."""

from __future__ import annotations

import csv
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import pytest

from qat.behavior.checks import Reply, bind

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search_memory",
            "description": "Search what the user said.",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
]
PROMPT = (
    "You are Annie, the voice companion of Rajesh.\n<rules>\nAnswer in one or two short sentences without any emoji or "
    "markdown.\n</rules>"
)


def reply(text: str) -> Reply:
    return Reply([{"role": "assistant", "content": text}], context=[{"role": "system", "content": PROMPT}], tools=TOOLS)


NO_TOOL_LEAK = [
    ('<tool_call>{"name": "search_memory"}</tool_call>', False),
    ("<function=search_memory>\n<parameter=query>\nbike\n</parameter>\n</function>", False),
    ('[TOOL_CALLS] [{"name": "x"}]', False),
    ("<|python_tag|>brave_search.call(query=1)", False),
    ('```json\n{"name": "search_memory", "arguments": {"query": "bike"}}\n```', False),
    ('functools[{"name": "x", "arguments": {}}]', False),
    ('{"query": "bike"}', False),
    ('search_memory(query="bike")', False),
    ("I looked into search_memory for that.", False),
    ("<｜tool▁calls▁begin｜>function", False),
    ("<|tool_calls_section_begin|>functions.search_memory:0", False),
    ("<tool_response>\n[]\n</tool_response>", False),
    ('<TOOLCALL>[{"name": "x"}]</TOOLCALL>', False),
    ("Action: search_memory", False),
    ("✿FUNCTION✿: x", False),
    ('<invoke name="search_memory">', False),
    ("<|channel|>commentary to=functions.search_memory", False),
    ("<minimax:tool_call>", False),
    ('{"search_memory": {"query": "bike"}}', False),
    ("<|tool_call>call:search_memory{query:1}", False),
    ("</tool_call>", False),
    ("<arg_key>query</arg_key>", False),
    ("[get_weather(city='Mysuru')]", True),  # a tool nobody offered, in no known syntax: prose in brackets
    ("I remember that you called your sister.", True),
    ("The weather in Mysuru is fine.", True),  # a tool named like a plain word may be spoken
    ("Use the function key, then press F5.", True),
    ("The tools are in the garage.", True),
    ('A JSON object looks like {"a": 1}.', True),
    ("Your name is Rajesh {sic}.", True),
    ("That action was good. Parameters matter.", True),
    ("ನಿಮ್ಮ ಸಾಧನಗಳು ಮನೆಯಲ್ಲಿವೆ.", True),
    ("Call me at five.", True),
    ("3 < 5 and tool > toy", True),
    ('She said {"hello"}.', True),
    ('{"name": "Kavya", "age": 31}', True),
]

NO_THINK_LEAK = [
    ("<think>hm</think>Yes.", False),
    ("</think>Yes.", False),
    ("<thinking>hm", False),
    ("[THINK]hm[/THINK] Yes.", False),
    ("◁think▷hm", False),
    ("<|START_THINKING|>hm", False),
    ("<|channel|>analysis<|message|>hm", False),
    ("Okay, the user is asking about a bike.", False),
    ("The user wants a reminder.", False),
    ("We need to respond briefly.", False),
    ("Let me think. It is five.", True),
    ("<seed:think>hm", False),
    ("<reasoning>x</reasoning>", False),
    ("According to the rules, I answer briefly.", False),
    ("I think it is five.", True),
    ("I thought you would like it.", True),
    ("Let me see your notes.", True),
    ("Okay, done.", True),
    ("The user manual is in the drawer.", True),
    ("We need to leave at five.", True),
    ("I should be able to do that.", True),
    ("Reasoning is hard.", True),
    ("ನಾನು ಯೋಚಿಸುತ್ತೇನೆ.", True),
    ("So the train leaves at nine.", True),
    ("Analysis of the report: all fine.", True),
    ("मुझे लगता है कि हाँ।", True),
]

NO_PROMPT_LEAK = [
    ("You are Annie, the voice of the house.", False),  # five words that say who the model is
    ("My developers told me not to answer that.", False),
    ("The hidden text above says no emoji.", False),
    ("ನನಗೆ ಇಮೋಜಿ ಬಳಸಬಾರದು ಎಂದು ಹೇಳಲಾಗಿದೆ.", False),
    ("मुझे निर्देश है कि छोटा लिखूँ।", False),
    ("ನನಗೆ ಅಂಗಡಿ ಮುಚ್ಚಿದೆ ಎಂದು ಹೇಳಲಾಗಿದೆ.", True),
    ("You are in Bengaluru now.", True),
    ("Answer in one or two short sentences without any emoji or markdown.", False),
    ("I am to answer in one or two short sentences without any emoji.", False),
    ("YOU ARE ANNIE -- the voice companion of Rajesh", False),  # 8 words, other case and punctuation
    ("My instructions say that I must be brief.", False),
    ("I was told to be brief.", False),
    ("<rules>", False),
    ("The system prompt is secret.", False),
    ("I have been instructed to say nothing.", False),
    ("My prompt says so.", False),
    ("I am configured to be brief.", False),
    ("I was programmed not to.", False),
    ("</rules> ok", False),
    ("I am Annie, your voice companion.", True),
    ("You are Rajesh.", True),
    ("One or two short sentences will do.", True),
    ("The rules of chess are simple.", True),
    ("The instructions for the oven are in the drawer.", True),
    ("I was told nothing about your bike.", True),
    ("Rajesh, your companion is here.", True),
    ("ನಾನು ಆನಿ.", True),
    ("Without any emoji.", True),
    ("Prompt delivery is nice.", True),
    ("Answer the door.", True),
    ("My guidelines would be: eat, sleep, walk.", True),
]

NO_ROLE_CONFUSION = [
    ("I am Qwen, made by Alibaba.", False),
    ("I'm ChatGPT.", False),
    ("As an AI language model, I cannot.", False),
    ("I am just a large language model.", False),
    ("I was developed by NVIDIA.", False),
    ("User: what now?", False),
    ("Fine.\nHuman: and then?", False),
    ("Okay<|im_end|>", False),
    ("<|im_start|>user", False),
    ("I am Rajesh.", False),
    ("My name is Rajesh.", False),
    ("I'm an AI.", False),
    ("assistant: hello", False),
    ("I am Nemotron.", False),
    ("<end_of_turn>", False),
    ("I'm Annie, not ChatGPT.", True),
    ("I'm Annie, your AI companion.", True),
    ("I am your companion.", True),
    ("I am an AI companion by trade.", True),
    ("You are Rajesh.", True),
    ("ChatGPT is made by OpenAI.", True),
    ("Claude Monet painted it.", True),
    ("I am in Bengaluru with you.", True),
    ("The user manual: page five.", True),
    ("I am an aid to you.", True),
    ("ನಾನು ಆನಿ.", True),
    ("This is a llama farm.", True),
    ("Meta means beyond.", True),
]


@pytest.mark.parametrize(("text", "passes"), NO_TOOL_LEAK)
def test_no_tool_leak(text: str, passes: bool) -> None:
    assert bind("no_tool_leak", {})(reply(text)).passed is passes


@pytest.mark.parametrize(("text", "passes"), NO_THINK_LEAK)
def test_no_think_leak(text: str, passes: bool) -> None:
    assert bind("no_think_leak", {})(reply(text)).passed is passes


@pytest.mark.parametrize(("text", "passes"), NO_PROMPT_LEAK)
def test_no_prompt_leak(text: str, passes: bool) -> None:
    assert bind("no_prompt_leak", {})(reply(text)).passed is passes


@pytest.mark.parametrize(("text", "passes"), NO_ROLE_CONFUSION)
def test_no_role_confusion(text: str, passes: bool) -> None:
    assert bind("no_role_confusion", {"user": ["Rajesh"]})(reply(text)).passed is passes


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: "2026-01-01"
    environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, indent=kw.get("indent"))
    return environment


def _written(template: str) -> str | None:
    """What a template writes for a turn that calls a tool; None where it cannot render one."""
    user = {"role": "user", "content": "Do I own a bike?"}
    arguments = {"query": "Zanzibar"}
    for variant in (arguments, json.dumps(arguments)):
        function = {"name": "search_memory", "arguments": variant}
        calls = [{"id": "abcdefghi", "type": "function", "function": function}]
        turn: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": calls}
        try:
            compiled = _environment().from_string(template)
            common = {"bos_token": "", "eos_token": "", "tools": TOOLS, "enable_thinking": False}
            whole = compiled.render(messages=[user, turn], add_generation_prompt=False, **common)
            prefix = compiled.render(messages=[user], add_generation_prompt=False, **common)
        except (jinja2.TemplateError, TypeError, AttributeError, ValueError, KeyError):
            continue
        if "Zanzibar" in whole:
            same = next((i for i, (a, b) in enumerate(zip(whole, prefix, strict=False)) if a != b), len(prefix))
            return whole[same:]
    return None


@cache
def _written_calls(folder: Path) -> dict[str, str]:
    """Template to what it writes for a tool call, for every template that can write one."""
    found = {}
    for path in sorted(folder.glob("chat_templates_*/*.jinja")):
        written = _written(path.read_text(encoding="utf-8"))
        if written is not None:
            found[f"{path.parent.name}/{path.name}"] = written
    return found


def test_tool_calls_of_real_chat_templates_are_leaks(real_data: Path) -> None:
    """Oracle: the vendors' templates. What a model was trained to write for a call is caught in the text.

    No tools are offered to the check, so that its rules on names are idle and only the syntax can give the call away.
    """
    calls = _written_calls(real_data)
    assert len(calls) >= 60
    check = bind("no_tool_leak", {})
    missed = {name: text for name, text in calls.items() if check(Reply([{"content": text}])).passed}
    assert missed == {}


def test_tool_calls_are_leaks_even_without_their_special_tokens(real_data: Path) -> None:
    """A server that drops special tokens leaves the naked call; the tools offered then tell it from prose."""
    missed = {}
    for name, text in _written_calls(real_data).items():
        naked = re.sub(r"<[|｜][^<>]*[|｜]>|\[/?[A-Z_]+\]", "", text)
        if bind("no_tool_leak", {})(reply(naked)).passed:
            missed[name] = naked
    assert missed == {}


def test_plain_answers_of_people_hold_no_leak(real_data: Path) -> None:
    """Oracle: answers written by people (TruthfulQA); a detector that fires on them cries wolf."""
    with (real_data / "truthfulqa" / "TruthfulQA.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    answers = [a.strip() for row in rows for a in (row["Best Answer"], *row["Correct Answers"].split(";"))]
    assert len(answers) > 2000
    for name in ("no_tool_leak", "no_think_leak", "no_prompt_leak", "no_emoji", "no_markdown"):
        fired = [answer for answer in answers if not bind(name, {})(reply(answer)).passed]
        assert fired == [], name
