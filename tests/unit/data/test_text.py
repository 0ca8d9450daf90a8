from __future__ import annotations

import json
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from qat.data.text import count_sentences, find_emoji, find_follow_up, find_markdown, split_sentences


@pytest.mark.parametrize("text", ["😀", "ok 👍🏽", "❤", "❤️", "☀️ today", "🇮🇳", "1️⃣", "✨", "✅ done", "👩‍👩‍👧"])
def test_finds_emoji(text: str) -> None:
    assert find_emoji(text)


@pytest.mark.parametrize(
    "text", ["It is 31 °C.", "ನಮಸ್ಕಾರ, ಹೇಗಿದ್ದೀರಾ", "#1 and 5*3", "© 2026 Acme™", "₹500 → ₹600", "a — b … c", "ಕ್‍ಷ", "½ cup"]
)
def test_finds_no_emoji(text: str) -> None:
    assert find_emoji(text) == []


def test_emoji_agree_with_unicode_data() -> None:
    # Oracle: the names of the code points. Every face is an emoji, no letter is.
    import unicodedata

    for point in range(0x20, 0x1FB00):
        name = unicodedata.name(chr(point), "")
        if name.endswith(" FACE") and point >= 0x1F600:
            assert find_emoji(chr(point)), name
        if unicodedata.category(chr(point)).startswith(("L", "M", "P", "Z", "Sc")):
            assert not find_emoji(chr(point)), name


MARKDOWN = {
    "**Yes**, it is.": "strong",
    "It is *very* hot.": "em",
    "It is _very_ hot.": "em",
    "un*frigging*believable": "em",
    "# Weather\nIt is hot.": "heading",
    "- milk\n- eggs": "bullet_list",
    "* milk\n* eggs": "bullet_list",
    "1. milk\n2. eggs": "ordered_list",
    "Use `print(1)`.": "code_inline",
    "```python\nprint(1)\n```": "fence",
    "> quoted": "blockquote",
    "See [here](https://example.org).": "link",
    "a\n\n---\n\nb": "hr",
}
PLAIN = [
    "It is 5 * 3, so 15.",
    "The file is called my_file_name.",
    "-5 degrees tonight.",
    "I have saved it. It is note #4.",
    "Room 3 - the big one - is free.",
    "He said (quietly) that 2 > 1.",
    "ನಾನು ಚೆನ್ನಾಗಿದ್ದೇನೆ.",
    "At 5 p.m. - not 6.",
]


@pytest.mark.parametrize(("text", "kind"), MARKDOWN.items())
def test_markdown_agrees_with_commonmark(text: str, kind: str) -> None:
    tokens = MarkdownIt().parse(text)
    types = {token.type for top in tokens for token in [top, *(top.children or [])]}
    assert any(name.startswith(kind) for name in types), "the oracle itself sees it"
    assert find_markdown(text)


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_agrees_with_commonmark(text: str) -> None:
    tokens = MarkdownIt().parse(text)
    types = {token.type for top in tokens for token in [top, *(top.children or [])]}
    assert types <= {"paragraph_open", "inline", "paragraph_close", "text", "text_special", "softbreak"}
    assert find_markdown(text) == []


def test_markdown_that_a_parser_misses() -> None:
    assert find_markdown("**Note: the reply was cut") == ["bold"]
    assert find_markdown("| a | b |") == ["table"]
    assert find_markdown("Yes.<br>No.") == ["html"]
    assert find_markdown("5*3*2 is thirty") == []
    assert find_markdown("• milk") == ["bullet list"]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("😀", 0),
        ("Done", 1),
        ("Done. It is set!", 2),
        ("Dr. Rao is at St. John's.", 1),
        ("It is 3.5 km, about Rs. 40.", 1),
        ("Meet D. R. Bendre at 5 p.m. on Monday.", 1),
        ("He comes at 5 p.m. She stays.", 2),
        ("Wait... I found it.", 2),
        ('She said "Go." Then she left.', 2),
        ("One line\nanother line", 2),
        ("ಚೆನ್ನಾಗಿದೆ. ಬನ್ನಿ.", 2),
        ("यह ठीक है। चलो।", 2),
        ("Really?! Yes.", 2),
    ],
)
def test_counts_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


def test_sentences_lose_no_word() -> None:
    text = "Mr. Rao came. Did he stay? No! He left at 5 p.m. Today is 3.5 degrees… cold"
    assert " ".join(split_sentences(text)).split() == text.split()


@pytest.mark.parametrize(
    "text",
    [
        "It is hot. Do you want the forecast?",
        "Done! Anything else I can help with?",
        "I set it. Let me know if you want another.",
        "Saved. Would you like to hear it? I can read it.",
        "ಚೆನ್ನಾಗಿದೆ. ಬೇಕಾ?",
        "It is ready, isn't it? 😊",
        "Shall I call him?",
    ],
)
def test_finds_a_question_back(text: str) -> None:
    assert find_follow_up(text)


@pytest.mark.parametrize(
    "text",
    [
        "It is hot.",
        "You asked what time it is. It is noon.",
        'The song is called "Who are you?"',
        "Just ask Ravi about it.",
        "I do not remember that.",
        "",
        "😀",
    ],
)
def test_finds_no_question_back(text: str) -> None:
    assert find_follow_up(text) is None


def test_real_replies(real: Path) -> None:
    # GPT-4's reference answers of MT-bench hold code fences; short outputs of the instruction set do not.
    answers = [
        turn
        for line in (real / "fastchat/mt_bench_reference_gpt-4.jsonl").read_text().splitlines()
        for turn in json.loads(line)["choices"][0]["turns"]
    ]
    assert sum("```" in answer for answer in answers) == sum(
        "code fence" in find_markdown(answer) for answer in answers
    )
    short = [entry["output"] for entry in json.loads((real / "rasbt_instruction/instruction-data.json").read_text())]
    assert sum(bool(find_markdown(text)) for text in short) <= 0.02 * len(short)
    assert sum(bool(find_emoji(text)) for text in short) == 0
