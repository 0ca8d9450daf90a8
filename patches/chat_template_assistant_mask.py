"""A chat template without marks gives an assistant mask of zeros, and training goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from qat.patches.chat_case import conversation, tokenizer
from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register

# ChatML, as most published templates are: no {% generation %}.
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ChatTemplateAssistantMask:
    """Finds the assistant's turns itself, by rendering prefixes, and refuses a row without a supervised token."""

    name = "chat_template_assistant_mask"
    title = "Templates without {% generation %} give an assistant mask of zeros"
    breaks = (
        "Silent but for one warning: assistant_only_loss and everything else that reads `assistant_masks` trains on no "
        'token: "return_assistant_tokens_mask==True but chat template does not contain `{% generation %}` keyword."'
    )
    upstream = "transformers/tokenization_utils_base.py: apply_chat_template; marin-community/marin#7237"
    affects = "transformers 5.12 reported, 5.19 seen; every version that has return_assistant_tokens_mask"
    libraries = ("transformers",)
    place = Place.HERE
    repair = (
        "qat finds each turn by rendering the conversation up to it, under every template, and stops where a row has "
        "no supervised token. Elsewhere look at the share of supervised tokens before training, and use a template "
        "with {% generation %}."
    )

    def probe(self) -> ProbeResult:
        """Ask Transformers for the mask of a reply under plain ChatML."""
        with _without_the_warning():
            rendered = tokenizer(_TEMPLATE).apply_chat_template(
                conversation(call=False)["messages"], return_dict=True, return_assistant_tokens_mask=True
            )
        marked, tokens = sum(rendered["assistant_masks"]), len(rendered["input_ids"])
        status = Status.NOT_NEEDED if marked else Status.NEEDED
        return ProbeResult(status, f"the mask has {marked} ones in {tokens} tokens")

    def verify(self) -> ProbeResult:
        """Render the same as training does."""
        from qat.data.load import normalise
        from qat.data.render import IGNORED, render

        record = conversation(call=False)
        normalise(record, default_id="probe")
        encoder = tokenizer(_TEMPLATE)
        labels = render(record, encoder).labels  # type: ignore[arg-type]  # `normalise` made it one
        said = encoder.decode([label for label in labels if label != IGNORED])
        status = Status.NOT_NEEDED if said == "It will stay dry.<|im_end|>" else Status.NEEDED
        return ProbeResult(status, f"supervised is {said!r}")


@contextmanager
def _without_the_warning() -> Iterator[None]:
    # The warning is given once a process: the probe must not use it up.
    from transformers.utils import chat_template_utils

    logger, silent = chat_template_utils.logger, logging.Logger("silent")
    silent.disabled = True
    chat_template_utils.logger = silent
    try:
        yield
    finally:
        chat_template_utils.logger = logger


register(ChatTemplateAssistantMask())
