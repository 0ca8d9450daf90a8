"""Tool-call arguments are JSON strings in OpenAI's form, and chat templates want mappings."""

from __future__ import annotations

from typing import Any

from qat.patches.chat_case import conversation
from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register

_CALL = (
    "{%% for m in messages %%}{{ m.role }}: {{ m.content }}{%% for c in m.tool_calls or [] %%}"
    "<{{ c.function.name }}>%s</{{ c.function.name }}>{%% endfor %%}\n{%% endfor %%}"
)
# How Nemotron 3 and Qwen 3.5 write arguments, and how Qwen 2.5, Llama 3 and gpt-oss do.
_ITERATES = _CALL % "{% for key, value in c.function.arguments|items %}{{ key }}={{ value }}{% endfor %}"
_DUMPS = _CALL % "{{ c.function.arguments|tojson }}"


class ChatTemplateStringArguments:
    """Turns them into mappings when conversations are read; vLLM does the same before it renders.

    docs/chat_templates.md counts the real templates that need it.
    """

    name = "chat_template_string_arguments"
    title = "Chat templates want tool-call arguments as mappings, and files hold them as JSON strings"
    breaks = (
        '"TypeError: Can only get item pairs from a mapping." with Nemotron 3, Qwen 3.5 and other templates that '
        r'iterate them. Silent: with Qwen 2.5, Llama 3, gpt-oss and others the model learns "{\"city\": …}", a quoted '
        "string that no tool parser takes for arguments."
    )
    upstream = "transformers/utils/chat_template_utils.py: render_jinja_template; QwenLM/Qwen3#1894"
    affects = "every transformers to 5.19; it is for the caller to convert"
    libraries = ("transformers", "jinja2")
    place = Place.HERE
    repair = (
        "qat parses the strings when it reads conversations (`load_conversations`), and refuses a template that leaves "
        "a call out. Elsewhere call json.loads on every `arguments` before apply_chat_template."
    )

    def probe(self) -> ProbeResult:
        """Render a call with a JSON string by both kinds of template."""
        return _outcome(conversation(call=True)["messages"])

    def verify(self) -> ProbeResult:
        """The same record after qat has read it."""
        from qat.data.load import normalise

        record = conversation(call=True)
        faults = normalise(record, default_id="probe")
        return ProbeResult(Status.NEEDED, faults[0]) if faults else _outcome(record["messages"])


def _outcome(messages: list[dict[str, Any]]) -> ProbeResult:
    faults = []
    try:
        _render(messages, _ITERATES)
    except TypeError as error:
        faults.append(f"a template that iterates the arguments fails (TypeError: {error})")
    if r"{\"city\"" in _render(messages, _DUMPS):
        faults.append("one that dumps them as JSON quotes them twice")
    if faults:
        return ProbeResult(Status.NEEDED, "; ".join(faults))
    return ProbeResult(Status.NOT_NEEDED, "a template that iterates the arguments and one that dumps them both render")


def _render(messages: list[dict[str, Any]], template: str) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template([messages], chat_template=template)
    return str(texts[0])


register(ChatTemplateStringArguments())
