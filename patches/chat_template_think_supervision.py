"""Training templates mark the empty think block, which the server writes, as the assistant's own words."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from qat.patches.chat_case import conversation, tokenizer
from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register

_TEMPLATE = "trl/chat_templates/nemotron_3_nano_training.jinja"


class ChatTemplateThinkSupervision:
    """Supervises from the end of the generation prompt on, whatever a template marks.

    With thinking off the prompt that vLLM builds ends with `<think></think>`; the model never has to write it. Learning
    to write it means learning to skip the thinking wherever it is on.
    """

    name = "chat_template_think_supervision"
    title = "Training templates supervise an empty <think></think> on every turn"
    breaks = (
        "Silent: with assistant_only_loss every reply trains the empty block too: part of the loss is spent on what "
        "the server writes, and with thinking on the model learns to skip the thinking."
    )
    upstream = f"{_TEMPLATE} (nine others of trl 1.16 do so too); NVIDIA-NeMo/Automodel#3738"
    affects = "trl 1.16"
    libraries = ("trl",)
    place = Place.HERE
    repair = (
        "qat renders the prompt of every turn as the server does and gives labels only to what follows it. Elsewhere "
        "mask the tokens of the generation prompt (rendered with enable_thinking=False) out of the assistant mask."
    )

    def probe(self) -> ProbeResult:
        """Look whether the marks of TRL's template for Nemotron 3 Nano cover the block."""
        from qat.data.templates import marks_empty_think

        template = _template()
        if template is None:
            return ProbeResult(Status.CANNOT_TELL, f"there is no {_TEMPLATE} here")
        if marks_empty_think(template):
            return ProbeResult(Status.NEEDED, f"{_TEMPLATE} marks the <think></think> of the generation prompt")
        return ProbeResult(Status.NOT_NEEDED, f"the marks of {_TEMPLATE} begin after the generation prompt")

    def verify(self) -> ProbeResult:
        """Render with the same template as training does, and read what is supervised."""
        from qat.data.load import normalise
        from qat.data.render import IGNORED, render_rows

        template = _template()
        if template is None:
            return ProbeResult(Status.CANNOT_TELL, f"there is no {_TEMPLATE} here")
        record = conversation(call=False)
        normalise(record, default_id="probe")
        encoder = tokenizer(template)
        supervised = [
            encoder.decode([label for label in row.labels if label != IGNORED])
            for row in render_rows(record, encoder)  # type: ignore[arg-type]  # `normalise` made it one
        ]
        status = Status.NEEDED if "think>" in "".join(supervised) else Status.NOT_NEEDED
        return ProbeResult(status, f"supervised is {', '.join(map(repr, supervised))}")


def _template() -> str | None:
    try:
        path = Path(str(metadata.distribution("trl").locate_file(_TEMPLATE)))  # without importing trl
    except metadata.PackageNotFoundError:
        return None
    return path.read_text(encoding="utf-8") if path.is_file() else None


register(ChatTemplateThinkSupervision())
