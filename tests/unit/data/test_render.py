"""Labels are held against a slow definition: a regular expression over the rendered text, one token a byte."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qat.data.render import IGNORED, render, render_replies
from qat.errors import UserError

REPLY = re.compile(r"<\|im_start\|>assistant\n(?:<think></think>)?(.*?<\|im_end\|>)", re.DOTALL)
CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


def supervised(tokenizer: Any, labels: list[int]) -> list[str]:
    """The supervised stretches, decoded."""
    stretches: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORED:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def plain(*contents: str, **more: Any) -> Any:
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    return {"id": "p", "category": "c", "messages": messages, **more}


def test_labels_are_exactly_the_replies(nemotron_like: Any, tool_conversation: Any) -> None:
    row = render(tool_conversation, nemotron_like)
    text = nemotron_like.apply_chat_template(tool_conversation["messages"], tokenize=False)
    assert nemotron_like.decode(row.input_ids) == text
    expected = [False] * len(row.input_ids)
    special = {token: len(token.encode()) for token in ("<|im_end|>", "<|im_start|>", "<think>", "</think>")}

    # Token index of a character: bytes before it, a special token counting as one.
    def index(position: int) -> int:
        before = text[:position]
        return len(before.encode()) - sum((size - 1) * before.count(token) for token, size in special.items())

    for match in REPLY.finditer(text):
        for place in range(index(match.start(1)), index(match.end(1))):
            expected[place] = True
    assert [label != IGNORED for label in row.labels] == expected
    assert all(label in (IGNORED, identity) for label, identity in zip(row.labels, row.input_ids, strict=True))
    assert sum(expected) > 50


def test_generation_prompt_is_not_supervised_and_the_end_of_turn_is(nemotron_like: Any) -> None:
    row = render(plain("Hi", "Hello.", "Bye", "Good night."), nemotron_like)
    assert supervised(nemotron_like, row.labels) == ["Hello.<|im_end|>", "Good night.<|im_end|>"]


def test_markers_give_the_same_row(
    nemotron_like: Any, tokenizer_of: Callable[..., Any], tool_conversation: Any
) -> None:
    template = nemotron_like.chat_template
    start, end = '"<|im_start|>assistant\n" }}', '{{- "<|im_end|>\n" }}'
    marked = template.replace(start, start + "{%- generation %}").replace(end, end + "{%- endgeneration %}", 1)
    assert marked.count("{%- generation %}") == marked.count("{%- endgeneration %}") == 1
    tokenizer = tokenizer_of(marked, ("<|im_end|>", "<|im_start|>", "<think>", "</think>"))
    assert render(tool_conversation, tokenizer) == render(tool_conversation, nemotron_like)


def test_markers_that_leave_a_turn_out_are_refused(nemotron_like: Any, tokenizer_of: Callable[..., Any]) -> None:
    marked = nemotron_like.chat_template.replace(
        '"<think></think>" }}', '"<think></think>" }}{% generation %}{% endgeneration %}', 1
    )
    tokenizer = tokenizer_of(marked, ("<|im_end|>", "<|im_start|>", "<think>", "</think>"))
    with pytest.raises(UserError, match="0 stretches for 1 assistant turns"):
        render(plain("Hi", "Hello."), tokenizer)


def test_dropped_history_is_refused_and_named(nemotron_like: Any) -> None:
    conversation = plain("Hi", "Hello.", "And?", "Fine.")
    conversation["messages"][3]["reasoning_content"] = "let me think"
    with pytest.raises(UserError, match=r"messages\[3\]"):
        render(conversation, nemotron_like)


QWEN_LIKE = (
    "{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{ m.content ~ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)


def test_a_template_that_drops_empty_think_blocks(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of(QWEN_LIKE, ("<|im_end|>", "<|im_start|>"))
    conversation = plain("Hi", "Hello.", "And?", "Fine.")
    with pytest.raises(UserError, match=r"messages\[1\]"):
        render(conversation, tokenizer)
    assert supervised(tokenizer, render(plain("Hi", "Hello."), tokenizer).labels) == ["Hello.<|im_end|>"]
    rows = render_replies(conversation, tokenizer)
    assert [supervised(tokenizer, row.labels) for row in rows] == [["Hello.<|im_end|>"], ["Fine.<|im_end|>"]]
    for turn, row in zip((1, 3), rows, strict=True):
        prompt = tokenizer.apply_chat_template(
            conversation["messages"][:turn], add_generation_prompt=True, tokenize=False
        )
        assert tokenizer.decode(row.input_ids).startswith(prompt)


def test_replies_of_a_stable_template_are_the_row_in_pieces(nemotron_like: Any, tool_conversation: Any) -> None:
    whole = render(tool_conversation, nemotron_like)
    rows = render_replies(tool_conversation, nemotron_like)
    assert rows[-1].input_ids == whole.input_ids
    union = [
        next((row.labels[i] for row in rows if i < len(row.labels) and row.labels[i] != IGNORED), IGNORED)
        for i in range(len(whole.labels))
    ]
    assert union == whole.labels


def test_a_reply_that_begins_inside_a_token_is_refused(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of(CHATML, ("<|im_end|>", "<|im_start|>"), merges=(("Ċ", "Ċ"),))
    assert supervised(tokenizer, render(plain("Hi", "Hello."), tokenizer).labels) == ["Hello.<|im_end|>"]
    with pytest.raises(UserError, match="begins inside a token"):
        render(plain("Hi", "\nHello."), tokenizer)


def test_a_template_without_end_of_turn_is_refused(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of(CHATML.replace("<|im_end|>", ""), ("<|im_end|>", "<|im_start|>"))
    with pytest.raises(UserError, match="never learn to stop"):
        render(plain("Hi", "Hello."), tokenizer)


def test_truncation_is_counted_and_never_empties_a_row(nemotron_like: Any) -> None:
    conversation = plain("Hi", "Hello there.")
    whole = render(conversation, nemotron_like)
    first = next(index for index, label in enumerate(whole.labels) if label != IGNORED)
    cut = render(conversation, nemotron_like, max_length=first + 3)
    assert cut.input_ids == whole.input_ids[: first + 3] and cut.labels == whole.labels[: first + 3]
    assert cut.dropped == len(whole.input_ids) - first - 3 and whole.dropped == 0
    with pytest.raises(
        UserError, match=f"no supervised token within the first {first} of {len(whole.input_ids)} tokens"
    ):
        render(conversation, nemotron_like, max_length=first)


def test_what_the_template_refuses_is_a_user_error(tokenizer_of: Callable[..., Any], tool_conversation: Any) -> None:
    tokenizer = tokenizer_of("{{ raise_exception('roles must alternate') }}", ("<|im_end|>",))
    with pytest.raises(UserError, match="roles must alternate"):
        render(plain("Hi", "Hello."), tokenizer)
    tool_conversation["messages"][2]["tool_calls"][0]["function"]["arguments"] = '{"city": "Mysuru"}'
    tokenizer = tokenizer_of(
        "{%- for k, v in messages[2].tool_calls[0].function.arguments|items %}{% endfor %}", ("<|im_end|>",)
    )
    with pytest.raises(UserError, match="TypeError: Can only get item pairs from a mapping"):
        render(tool_conversation, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        render(plain("Hi", "Hello."), tokenizer)


def test_a_template_that_leaves_out_tools_calls_or_contents_is_refused(
    tokenizer_of: Callable[..., Any], tool_conversation: Any
) -> None:
    special = ("<|im_end|>", "<|im_start|>")
    with pytest.raises(UserError, match="leaves out the tool 'get_weather'"):
        render(tool_conversation, tokenizer_of(CHATML, special))
    with pytest.raises(UserError, match=r"leaves out the call of 'get_weather' in messages\[2\]"):
        render(tool_conversation, tokenizer_of("{{ tools | string }}" + CHATML, special))
    no_system = CHATML.replace("in messages %}", "in messages if m.role != 'system' %}")
    with pytest.raises(UserError, match=r"leaves out the content of messages\[0\] \(system\)"):
        render(
            {
                **tool_conversation,
                "messages": [*tool_conversation["messages"][:2], {"role": "assistant", "content": "a"}],
                "tools": [],
            },
            tokenizer_of(no_system, special),
        )


def test_a_conversation_without_reply_is_refused(nemotron_like: Any) -> None:
    for function in (render, render_replies):
        with pytest.raises(UserError, match=r"no supervised token|no assistant turn"):
            function(plain("Hi"), nemotron_like)


# --- real templates ------------------------------------------------------------------------------------------------

SPECIAL_LIKE = re.compile(
    r"<\|[^|<>\s]+\|?>|<[^|<>\s]+\|>|<｜[^｜]+｜>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|\[\|\w+\|\]|</?seed:\w+>|<sep>"
)


def real_template(real: Path, tokenizer_of: Callable[..., Any], name: str) -> Any:
    template = (real / name).read_text("utf-8")
    special = ("<|im_end|>", "<|im_start|>", "</s>", "<s>", "<think>", "</think>", "<tool_call>", "</tool_call>")
    return tokenizer_of(template, tuple(dict.fromkeys((*special, *SPECIAL_LIKE.findall(template)))))


@pytest.fixture(scope="module")
def real_tokenizer(real: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real / "qwen3_tokenizer")


@pytest.mark.parametrize("variant", ["tools", "chat", "content_and_call"])
def test_real_nemotron_template_with_and_without_markers(
    real: Path, real_tokenizer: Any, tool_conversation: Any, variant: str
) -> None:
    if variant == "chat":
        tool_conversation = plain("Hi", "Hello.", "Who are you?", "Annie.")
    if variant == "content_and_call":
        tool_conversation["messages"][2]["content"] = "Let me look."
    rows = []
    for name in ("nemotron_3_nano", "nemotron_3_nano_training"):
        real_tokenizer.chat_template = (real / f"chat_templates_trl/{name}.jinja").read_text()
        rows.append(render(tool_conversation, real_tokenizer))
    assert rows[0] == rows[1]
    stretches = supervised(real_tokenizer, rows[0].labels)
    assert stretches == REPLY.findall(real_tokenizer.decode(rows[0].input_ids))
    assert not any("think" in stretch for stretch in stretches) and all(s.endswith("<|im_end|>") for s in stretches)
    # TRL's own mask supervises the empty think block: the difference this renderer makes.
    mask = real_tokenizer.apply_chat_template(
        tool_conversation["messages"],
        tools=tool_conversation.get("tools"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )["assistant_masks"]
    think = real_tokenizer.convert_tokens_to_ids("</think>")
    assert any(on and identity == think for on, identity in zip(mask, rows[0].input_ids, strict=True))
    assert not any(label == think for label in rows[0].labels)


def test_the_row_begins_with_the_served_tokens(real: Path, real_tokenizer: Any, tool_conversation: Any) -> None:
    """Slow definition: tokenize each served prompt as the server does."""
    real_tokenizer.chat_template = (real / "chat_templates_trl/nemotron_3_nano.jinja").read_text()
    row = render(tool_conversation, real_tokenizer)
    for turn in (2, 4, 6):
        prompt = real_tokenizer.apply_chat_template(
            tool_conversation["messages"][:turn],
            tools=tool_conversation["tools"],
            add_generation_prompt=True,
            enable_thinking=False,
        )["input_ids"]
        assert row.input_ids[: len(prompt)] == prompt
        assert row.labels[len(prompt) - 1] == IGNORED and row.labels[len(prompt)] != IGNORED


def test_real_nemotron_template_drops_earlier_thinking(real: Path, real_tokenizer: Any) -> None:
    real_tokenizer.chat_template = (real / "chat_templates_trl/nemotron_3_nano.jinja").read_text()
    conversation = plain("Hi", "<think>\nhm\n</think>\nHello.", "And?", "Fine.")
    with pytest.raises(UserError, match=r"messages\[1\]"):
        render(conversation, real_tokenizer)


def test_a_thousand_conversations_take_seconds(real: Path, real_tokenizer: Any, tool_conversation: Any) -> None:
    real_tokenizer.chat_template = (real / "chat_templates_trl/nemotron_3_nano.jinja").read_text()
    render(tool_conversation, real_tokenizer)
    started = time.process_time()
    for number in range(100):
        render({**tool_conversation, "id": str(number)}, real_tokenizer)
    assert time.process_time() - started < 2.0


def templates() -> list[str]:
    import os

    folder = Path(os.environ.get("QAT_REAL_DATA", Path(__file__).resolve().parents[4] / "shared" / "real"))
    return sorted(str(path.relative_to(folder)) for path in folder.glob("chat_templates_*/*.jinja"))


# What these templates do that makes a tool conversation unfit for them; everything else must render.
KNOWN = json.loads(Path(__file__).with_name("real_templates.json").read_text())


@pytest.mark.parametrize("name", templates() or ["none"])
def test_real_templates_with_a_tool_conversation(
    real: Path, tokenizer_of: Callable[..., Any], tool_conversation: Any, name: str
) -> None:
    """Every real template either renders exactly the replies, or is refused for the recorded reason."""
    outcome = outcome_of(real_template(real, tokenizer_of, name), tool_conversation)
    assert outcome == KNOWN.get(name, "rendered"), name


def outcome_of(tokenizer: Any, conversation: Any) -> str:
    for how, function in (
        ("rendered", lambda: [render(conversation, tokenizer)]),
        ("one row per reply", lambda: render_replies(conversation, tokenizer)),
    ):
        try:
            stretches = [text for row in function() for text in supervised(tokenizer, row.labels)]
        except UserError as error:
            reason = error.what.split(":")[0]
            continue
        assert len(stretches) == 3 and "get_weather" in stretches[0]
        assert "It is thirty-one degrees." in stretches[1] and "Any time." in stretches[2]
        assert not any(word in "".join(stretches) for word in ("Weather in", "ಧನ್ಯ", "31 degrees", "You are"))
        return how
    return reason
