"""Chat templates as what they are, programs of strangers: rendered within bounds, and asked what they can do.

`render_template` runs a template in a child process under the kernel's limits on processor time and memory, inside
Jinja's immutable sandbox (`template_worker.py` says why a thread would not do). `survey` puts the conversations that
matter to a persona through it, a plain one and one with a tool call in each form that its arguments come in;
`check_template` is the list of what is wrong.

The form that counts is the mapping: `load_conversations` turns OpenAI's JSON strings into mappings, and so does vLLM
before it renders (`_postprocess_messages` in `vllm/renderers/chat_utils.py`, 0.32). A template that only takes strings
breaks there too.
"""

from __future__ import annotations

import copy
import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from qat.data.load import normalise
from qat.errors import UserError

MAX_TEMPLATE = 1_000_000
"""Characters of a template; the longest real one seen has 17 000."""
MAX_OUTPUT = 1_000_000
"""Characters of one rendering."""
CPU_SECONDS = 5
"""For all renderings of one call; a real template takes a thousandth of it."""
MEMORY_BYTES = 1 << 29
_WALL_SECONDS = 60.0
"""A template cannot sleep, so that processor time is what bounds it; this is for a machine that stands still."""

HTML_QUOTE = "&#34;"
"""What Jinja makes of a quote in `'…"' + (value|tojson|safe)`: `safe` marks the value as HTML, and `+` then escapes
the other side, autoescape or not."""

_WORKER = Path(__file__).with_name("template_worker.py")
_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>")


class Rendering(NamedTuple):
    """What a template made of one conversation.

    Attributes:
        text: The text; empty where it refused.
        spans: Character ranges `(start, end)` that `{% generation %}` marks.
        error: Type and message of what it raised; empty where it rendered.
    """

    text: str
    spans: list[tuple[int, int]]
    error: str


class _Refusal(NamedTuple):
    what: str
    value: str

    def problem(self) -> str:
        return f"{self.what}: {self.value}"

    def error(self) -> UserError:
        return UserError(
            f"The chat template {self.what}.", value=self.value, remedy="use the template of the model's publisher"
        )


def render_template(template: str, requests: Sequence[Mapping[str, Any]]) -> list[Rendering]:
    """Render a template that nobody vouches for, in bounded time and memory.

    Args:
        template: Its text.
        requests: Per rendering the template's variables, JSON values: `messages`, `tools`, `add_generation_prompt`, …

    Returns:
        One rendering per request. What the template raises by itself is in `Rendering.error`.

    Raises:
        UserError: The template is too long, is no Jinja, or was stopped: too much time, too much text or memory, or it
            crashed its process.
    """
    outcome = _run(template, requests)
    if isinstance(outcome, _Refusal):
        raise outcome.error()
    return outcome


def require_bounded(template: str) -> None:
    """Refuse a template that is not fit to be run in this process; asks the child process once per text.

    Args:
        template: Its text.

    Raises:
        UserError: As for `render_template`.
    """
    if refusal := _refusal(template):
        raise refusal.error()


@lru_cache(maxsize=32)
def _refusal(template: str) -> _Refusal | None:
    outcome = _run(template, [_request(_TURNS), _request(_calling(_ARGUMENTS), tools=True)])
    return outcome if isinstance(outcome, _Refusal) else None


def _run(template: str, requests: Sequence[Mapping[str, Any]]) -> list[Rendering] | _Refusal:
    if len(template) > MAX_TEMPLATE:
        return _Refusal("is too long", f"{len(template)} characters, at most {MAX_TEMPLATE} are read")
    request = {
        "template": template,
        "requests": requests,
        "characters": MAX_OUTPUT,
        "cpu_seconds": CPU_SECONDS,
        "memory_bytes": MEMORY_BYTES,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_WORKER)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _Refusal("does not end", f"stopped after {_WALL_SECONDS:.0f} s")
    if done.returncode == -signal.SIGXCPU:
        return _Refusal("does not end", f"stopped after {CPU_SECONDS} s of processor time")
    if done.returncode < 0:
        return _Refusal("crashes its process", signal.Signals(-done.returncode).name)
    if done.returncode > 0:
        raise RuntimeError(f"the template worker failed: {done.stderr[-2000:]}")
    answer = json.loads(done.stdout)
    if "fault" in answer:
        return _Refusal(answer["fault"], answer["value"])
    return [
        Rendering(one.get("text", ""), [(start, end) for start, end in one.get("spans", ())], one.get("error", ""))
        for one in answer["renderings"]
    ]


class Survey(NamedTuple):
    """What a template can do; each reason is empty where it can.

    Attributes:
        plain: Why it does not render system, user and assistant turns.
        mapping: Why it does not render a tool call whose arguments are a mapping, its result and the reply.
        string: The same for arguments as a JSON string, as OpenAI writes them.
        normalised: The same for the latter after `load.normalise`.
        marked: Whether `{% generation %}` marks cover the assistant's replies.
        empty_think: Whether they also cover an empty think block that the generation prompt already holds.
    """

    plain: str
    mapping: str
    string: str
    normalised: str
    marked: bool
    empty_think: bool

    @property
    def reason(self) -> str:
        """Why a tool conversation cannot be rendered as qat and vLLM pass it; empty where it can."""
        if self.normalised and not self.string:
            return f"takes JSON strings only, and vLLM passes mappings: {self.normalised}"
        return self.normalised


def survey(template: str) -> Survey:
    """Put a plain conversation and one with a tool call through a template.

    Args:
        template: Its text.

    Returns:
        What it can do. A rendering counts only if it holds everything that was said, offered and called.

    Raises:
        UserError: As for `render_template`.
    """
    as_string = _calling(json.dumps(_ARGUMENTS))
    record = {"messages": copy.deepcopy(as_string), "tools": [_TOOL]}
    if faults := normalise(record, default_id="survey"):
        raise RuntimeError(f"the survey's own conversation has faults: {faults}")
    plain, prompt, mapping, string, normalised = render_template(
        template,
        [
            _request(_TURNS),
            _request(_TURNS[:2], prompt=True),
            _request(_calling(_ARGUMENTS), tools=True),
            _request(as_string, tools=True),
            _request(record["messages"], tools=True),
        ],
    )
    of_mapping, of_string = _tool_fault(mapping), _tool_fault(string)
    if not of_mapping and not of_string and string.text != mapping.text:
        of_string = "writes another text than for a mapping"
    return Survey(
        plain=_plain_fault(plain),
        mapping=of_mapping,
        string=of_string,
        normalised=_tool_fault(normalised),
        marked=any(_ANSWER in plain.text[start:end] for start, end in plain.spans),
        empty_think=_marks_empty_think(plain, prompt),
    )


def check_template(text: str) -> list[str]:
    """Say what is wrong with a template, without running it in this process.

    Args:
        text: The template.

    Returns:
        One line per problem, empty where there is none; a problem with tool conversations alone begins with `tools: `.
    """
    if refusal := _refusal(text):
        return [refusal.problem()]
    found = survey(text)
    if found.plain:
        return [f"a plain conversation: {found.plain}"]
    return [f"tools: {found.reason}"] if found.reason else []


def marks_empty_think(template: str) -> bool:
    """Whether a template's marks supervise `<think></think>`, which with thinking off the server writes.

    Args:
        template: Its text.

    Raises:
        UserError: As for `render_template`.
    """
    plain, prompt = render_template(template, [_request(_TURNS), _request(_TURNS[:2], prompt=True)])
    return _marks_empty_think(plain, prompt)


_SYSTEM = "You are the assistant of a house."
_QUESTION = "Do I need an umbrella?"
_ANSWER = "It will stay dry."
_RESULT = "31 degrees and dust"
_PURPOSE = "Forecast of a place."
_ARGUMENTS: dict[str, Any] = {"city": "Mysuru", "days": 3}
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": _PURPOSE,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The place."},
                "days": {"type": "integer", "description": "How far ahead."},
            },
            "required": ["city"],
        },
    },
}
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_TURNS = [
    {"role": "system", "content": _SYSTEM},
    {"role": "user", "content": _QUESTION},
    {"role": "assistant", "content": _ANSWER},
]


def _calling(arguments: object) -> list[dict[str, Any]]:
    # Nine letters and digits: Mistral's templates refuse any other id.
    call = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return [
        *_TURNS[:2],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": _RESULT},
        _TURNS[2],
    ]


def _request(messages: Sequence[Mapping[str, Any]], *, tools: bool = False, prompt: bool = False) -> dict[str, Any]:
    return {
        **_TOKENS,
        "messages": messages,
        "tools": [_TOOL] if tools else None,
        "documents": None,
        "add_generation_prompt": prompt,
        "enable_thinking": False,
    }


def _plain_fault(rendering: Rendering) -> str:
    if rendering.error:
        return rendering.error
    said = {"system": _SYSTEM, "user": _QUESTION, "assistant": _ANSWER}
    missing = [role for role, content in said.items() if content not in rendering.text]
    return f"leaves out the {', '.join(missing)} message" if missing else ""


def _tool_fault(rendering: Rendering) -> str:
    if fault := _plain_fault(rendering):
        return fault
    text = rendering.text
    if HTML_QUOTE in text:
        return f"writes {HTML_QUOTE} for quotes (safe and + in one expression)"
    if _PURPOSE not in text:
        return "leaves out the tools"
    if _ARGUMENTS["city"] not in text:
        return "leaves out the call"
    if re.search(r'\{\\"city\\": ?\\"Mysuru', text):
        return r'writes the arguments as a quoted string, "{\"city\": …}"'
    if "{'city': 'Mysuru'" in text:  # with the value: some templates write the tools' schemas so
        return "writes the arguments as a Python dictionary, {'city': …}"
    if not any(form in text for form in (_RESULT, json.dumps(_RESULT))):
        return "leaves out the tool's result"
    return ""


def _marks_empty_think(plain: Rendering, prompt: Rendering) -> bool:
    return plain.text.startswith(prompt.text) and any(
        start < len(prompt.text) and _EMPTY_THINK.match(plain.text[start:end]) is not None for start, end in plain.spans
    )
