"""Defects of chat templates: seen through the library's own front door, and gone on qat's way."""

from __future__ import annotations

import logging
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from qat.data import load, render
from qat.patches import chat_case, chat_template_think_supervision
from qat.patches.chat_template_assistant_mask import ChatTemplateAssistantMask
from qat.patches.chat_template_html_quotes import ChatTemplateHtmlQuotes
from qat.patches.chat_template_string_arguments import ChatTemplateStringArguments
from qat.patches.chat_template_think_supervision import ChatTemplateThinkSupervision
from qat.patches.protocol import Status

QWEN3 = "chat_templates_llamacpp/Qwen3-Coder.jinja"
NANO = "chat_templates_trl/nemotron_3_nano.jinja"


def test_a_json_string_breaks_real_templates(real_data: Path) -> None:
    """What the probe says of its minimal template, said by Nemotron's own; and what the repair says of both."""
    for name in (NANO, QWEN3):
        tokenizer = chat_case.tokenizer((real_data / name).read_text())
        record = chat_case.conversation(call=True)
        with pytest.raises(TypeError, match="Can only get item pairs from a mapping"):
            tokenizer.apply_chat_template(record["messages"], tokenize=False)
        assert load.normalise(record, default_id="x") == []
        assert "<parameter=city>\nMysuru\n</parameter>" in tokenizer.apply_chat_template(
            record["messages"], tokenize=False
        )


def test_string_arguments() -> None:
    defect = ChatTemplateStringArguments()
    found = defect.probe()
    assert found.status is Status.NEEDED
    assert "TypeError: Can only get item pairs from a mapping." in found.detail and "quotes them twice" in found.detail
    assert defect.verify().status is Status.NOT_NEEDED


@pytest.mark.parametrize("broken", ["{}", "text"])
def test_a_reading_that_leaves_strings_is_noticed(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    # `normalise` that does nothing, and one that finds faults of its own.
    faults = [] if broken == "{}" else ["messages[1]: no"]
    monkeypatch.setattr(load, "normalise", lambda record, default_id: faults)
    assert ChatTemplateStringArguments().verify().status is Status.NEEDED


def test_think_supervision() -> None:
    template = metadata.distribution("trl").locate_file("trl/chat_templates/nemotron_3_nano_training.jinja").read_text()
    tokenizer = chat_case.tokenizer(template)
    rendered = tokenizer.apply_chat_template(
        chat_case.conversation(call=False)["messages"],
        return_dict=True,
        return_assistant_tokens_mask=True,
        enable_thinking=False,
    )
    marked = [i for i, one in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if one]
    assert tokenizer.decode(marked).startswith("<think></think>It will stay dry.<|im_end|>")
    defect = ChatTemplateThinkSupervision()
    assert defect.probe().status is Status.NEEDED
    found = defect.verify()
    assert found.status is Status.NOT_NEEDED and "'It will stay dry.<|im_end|>'" in found.detail


def test_think_supervision_that_stays_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(record: Any, tokenizer: Any) -> list[render.Rendered]:
        ids = tokenizer.apply_chat_template(record["messages"], enable_thinking=False)["input_ids"]
        return [render.Rendered(list(ids), list(ids))]

    monkeypatch.setattr(render, "render_rows", everything)
    assert ChatTemplateThinkSupervision().verify().status is Status.NEEDED


def test_another_or_no_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    defect = ChatTemplateThinkSupervision()
    monkeypatch.setattr(chat_template_think_supervision, "_TEMPLATE", "trl/none.jinja")
    assert defect.probe().status is defect.verify().status is Status.CANNOT_TELL

    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert defect.probe().status is defect.verify().status is Status.CANNOT_TELL
    monkeypatch.setattr(
        chat_template_think_supervision,
        "_template",
        lambda: "{% for m in messages %}<think></think>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    )
    assert defect.probe().status is Status.NOT_NEEDED


def test_assistant_mask(caplog: pytest.LogCaptureFixture) -> None:
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        defect = ChatTemplateAssistantMask()
        found = defect.probe()
        assert found.status is Status.NEEDED and found.detail.startswith("the mask has 0 ones in ")
        assert not caplog.records
        assert defect.verify().status is Status.NOT_NEEDED
        # The library's own warning, given once a process, is still to come.
        tokenizer = chat_case.tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
        assert not any(
            tokenizer.apply_chat_template(
                [{"role": "assistant", "content": "Hi."}], return_dict=True, return_assistant_tokens_mask=True
            )["assistant_masks"]
        )
        assert "does not contain `{% generation %}` keyword" in caplog.text
        assert "does not contain `{% generation %}` keyword" in defect.breaks
    finally:
        logger.removeHandler(caplog.handler)


def test_an_empty_mask_on_qats_way_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "render", lambda record, tokenizer: render.Rendered([1], [render.IGNORED]))
    assert ChatTemplateAssistantMask().verify().status is Status.NEEDED


def test_html_quotes_in_real_templates(real_data: Path) -> None:
    tokenizer = chat_case.tokenizer((real_data / "chat_templates_mistral_common/v7.jinja").read_text())
    record = chat_case.conversation(call=True)
    as_string = tokenizer.apply_chat_template(record["messages"], tokenize=False, bos_token="<s>", eos_token="</s>")
    load.normalise(record, default_id="x")
    as_mapping = tokenizer.apply_chat_template(record["messages"], tokenize=False, bos_token="<s>", eos_token="</s>")
    assert '[{"name": "get_weather"' in as_string and "[{&#34;name&#34;: &#34;get_weather&#34;" in as_mapping


def test_html_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    defect = ChatTemplateHtmlQuotes()
    found = defect.probe()
    assert found.status is Status.NEEDED and "{&#34;name&#34;: &#34;get_weat" in found.detail
    assert defect.verify().status is Status.NOT_NEEDED
    monkeypatch.setattr(render, "HTML_QUOTE", "&quot;")
    assert defect.verify().status is Status.NEEDED
