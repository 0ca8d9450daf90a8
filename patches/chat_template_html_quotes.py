"""A chat template that adds texts to `tojson|safe` writes HTML for quotes."""

from __future__ import annotations

from typing import Any

from qat.errors import UserError
from qat.patches.chat_case import conversation, tokenizer
from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register

# ChatML with the expression that mistral-common's templates v2 to v7 have around a call.
_TEMPLATE = """
{%- for m in messages %}{{- "<|im_start|>" ~ m.role ~ "\n" ~ m.content }}
{%- for c in m.tool_calls or [] %}
{{- '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments|tojson|safe + '}' }}
{%- endfor %}{{- "<|im_end|>\n" }}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{%- endif %}"""


class ChatTemplateHtmlQuotes:
    """Refuses rows in which a template has written HTML; taking the `safe` out would part them from what is served.

    `safe` marks a text as HTML, and Jinja's `+` then escapes the other side, though autoescape is off. With a JSON
    string the same templates take another branch and write plain quotes.
    """

    name = "chat_template_html_quotes"
    title = "Templates that add texts to `tojson|safe` write &#34; for the quotes of a tool call"
    breaks = "Silent: the model learns [{&#34;name&#34;: &#34;get_weather&#34;, …}], and no tool parser finds a call."
    upstream = (
        "markupsafe: Markup.__radd__; mistralai/mistral-common tests/data/chat_templates v2 to v7 with mappings, which "
        "is what vLLM passes"
    )
    affects = "every jinja2 3.1 with transformers to 5.19"
    libraries = ("transformers", "jinja2", "markupsafe")
    place = Place.HERE
    repair = (
        "qat refuses to train on such rows and `qat doctor` names the template. The remedy, here and elsewhere, is to "
        "take `|safe` out of the checkpoint's template, for training and for serving."
    )

    def probe(self) -> ProbeResult:
        """Render a call by such a template."""
        text = tokenizer(_TEMPLATE).apply_chat_template(_record()["messages"], tokenize=False)
        if "&#34;" in text:
            return ProbeResult(Status.NEEDED, f"the call reads {text[text.index('{') :][:30]}…")
        return ProbeResult(Status.NOT_NEEDED, "the call has plain quotes")

    def verify(self) -> ProbeResult:
        """Hand the same to training."""
        from qat.data.render import render

        try:
            render(_record(), tokenizer(_TEMPLATE))  # type: ignore[arg-type]  # `normalise` made it a conversation
        except UserError as error:
            return ProbeResult(Status.NOT_NEEDED, f"refused: {error.what}")
        return ProbeResult(Status.NEEDED, "qat trains on it")


def _record() -> dict[str, Any]:
    from qat.data.load import normalise

    record = conversation(call=True)
    normalise(record, default_id="probe")
    return record


register(ChatTemplateHtmlQuotes())
