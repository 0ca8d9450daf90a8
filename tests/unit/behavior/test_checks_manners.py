"""Hand-labelled replies for the checks of manners: the label is a person's judgement, not the code's."""

from __future__ import annotations

import time

import pytest
import regex

from qat.behavior.checks import Reply, bind


def reply(text: str, **more: object) -> Reply:
    return Reply([{"role": "assistant", "content": text} | more])


NO_EMOJI = [
    ("Good morning 😊", False),
    ("Done ✅", False),
    ("I ❤️ dosa", False),
    ("I ❤ dosa", False),
    ("Sunny ☀ today", False),
    ("It is 31 degrees 🌡", False),  # text presentation by default, drawn as a picture all the same
    ("Family time 👨‍👩‍👧‍👦", False),  # joined by U+200D
    ("Jai Hind 🇮🇳", False),
    ("Press 1️⃣ for yes", False),
    ("Press #️⃣", False),
    ("Nice 👍🏽", False),
    ("🏴󠁧󠁢󠁥󠁮󠁧󠁿 won", False),
    ("ನಮಸ್ಕಾರ 🙏", False),
    ("Trade ™️", False),  # U+FE0F asks for the picture
    ("Okay ✔", False),
    ("Take care ☺", False),
    ("🧑🏾‍💻", False),
    ("ನಮಸ್ಕಾರ, ಹೇಗಿದ್ದೀರಿ", True),
    ("ಕ್‍ಷ and ರ‍್ಯ use a joiner", True),  # U+200D shapes the conjunct
    ("क्‍ष is Devanagari", True),
    ("© 2024 Acme® and Foo™", True),
    ("5 * 3 # 2", True),
    ("At 7:30, 1,250 rupees (₹1,250)", True),
    ("Go north → then east", True),
    ("It costs 20 € or £18", True),
    ("Smile :-)", True),
    ("東京 and Москва", True),
    ("a • b · c – d — e … f", True),
    ("½ cup, 30 °C, x²", True),
    ("", True),
]

NO_MARKDOWN = [
    ("That is **important**.", False),
    ("# Plan\nWe go.", False),
    ("- milk\n- eggs", False),
    ("* milk\n* eggs", False),
    ("1. milk\n2. eggs", False),
    ("Here:\n\n1) milk\n2) eggs", False),
    ("```python\nprint(1)\n```", False),
    ("Use `ls` there.", False),
    ("See [this](https://example.org).", False),
    ("That is *really* good.", False),
    ("That is _really_ good.", False),
    ("> as you said", False),
    ("one\n\n---\n\ntwo", False),
    ("| a | b |\n|---|---|\n| 1 | 2 |", False),
    ("~~old~~ new", False),
    ("**unfinished bold", False),
    ("##Plan", False),
    ("• milk\n• eggs", False),
    ("line<br>line", False),
    ("![cat](cat.png)", False),
    ("Plan\n====\nWe go.", False),
    ("ಇದು **ಮುಖ್ಯ**.", False),
    ("It is 5 * 3 * 2.", True),
    ("The file is my_long_file_name.txt.", True),
    ("2024. That was a good year.", True),
    ("It is -5 degrees outside.", True),
    ("I am #1 here, and #kannada is a tag.", True),
    ("Is 3 < 5 and 5 > 3? Yes.", True),
    ("He said [sic] that it works.", True),
    ("Meet at 7:30 - bring coffee.", True),
    ("a ~ b, and ~5 minutes", True),
    ("ನಮಸ್ಕಾರ ರಾಜೇಶ್.", True),
    ("It costs $5, or ₹400.", True),
    ("C++ and C# are languages.", True),
    ("See https://example.org/a_b_c today.", True),
]

# The number of sentences a person hears.
SENTENCES = [
    ("M.G. Road is crowded. Take the metro.", 2),
    ("The U.S. President spoke.", 1),
    ("He is in the U.S. It rains.", 2),
    ("Well... never mind.", 1),
    ("Wait… it is late.", 1),
    ("Wait... It is late.", 2),
    ("It is on Sat. evening, Jan. 26.", 1),
    ("ಎಂ.ಜಿ. ರಸ್ತೆಯಲ್ಲಿ ದಟ್ಟಣೆ ಇದೆ.", 1),
    ("Hello.", 1),
    ("Hello", 1),
    ("Hello. I am here.", 2),
    ("Dr. Rao called at 5 p.m. today.", 1),
    ("Wait... I see.", 2),
    ("It is 3.5 kilometres.", 1),
    ("Really?! Yes.", 2),
    ('He said "Go." Then he left.', 2),
    ("One\nTwo\nThree", 3),
    ("ನಮಸ್ಕಾರ. ಹೇಗಿದ್ದೀರಿ?", 2),
    ("यह अच्छा है। धन्यवाद।", 2),
    ("A. R. Rahman sang.", 1),
    ("Mr. and Mrs. Rao live on 5th St. in town.", 1),
    ("😊", 0),
    ("", 0),
    ("Yes! No! Maybe!", 3),
]

WORDS = [
    ("one two three", 3),
    ("well-known facts", 2),
    ("It's 7:30 now", 3),
    ("don't", 1),
    ("ನಮಸ್ಕಾರ ರಾಜೇಶ್ ಹೇಗಿದ್ದೀರಿ", 3),
    ("ಕ್‍ಷಮಿಸಿ", 1),
    ("你好吗", 3),
    ("1,250 rupees", 2),
    ("— … !", 0),
    ("नमस्ते दुनिया", 2),
    ("a/b", 2),
    ("café au lait", 3),
]

NO_FOLLOW_UP = [
    ("It closes at nine, okay?", True),
    ("I'll set it for nine, okay?", False),
    ("You wanted the news, right? India won.", True),
    ("It is at nine, right?", False),
    ("Do you know why? Air scatters blue light.", True),
    ("Do you know the street? I can look it up.", False),
    ("Do you remember the title?", False),
    ("The form asks: do you smoke?", True),
    ("Let me know, she said.", True),
    ("Here is a riddle for you:\nWhat has keys and no locks?", True),
    ("I have one question:\nWhen are you back?", False),
    ("I am here whenever you need me.", False),
    ("何時がいいですか。", False),
    ("Who would have thought?", True),
    ("Done. Would you like anything else?", False),
    ("Your sister is Kavya. Do you want to call her?", False),
    ("Shall I set it for seven?", False),
    (
        "It is sunny. What are your plans",
        True,
    ),  # no mark: a listener hears a statement; the check stays with marks and offers
    ("It is sunny. What are your plans?", False),
    ("Let me know if you need more.", False),
    ("Noted. Feel free to ask.", False),
    ("Is it for today? I set it.", True),
    ("Should I call your sister? I can do it now.", False),
    ("Want me to add milk? 😊", False),
    ("Anything else I can help with?", False),
    ("ನಿಮಗೆ ಇನ್ನೇನು ಬೇಕು?", False),
    ("क्या आप और जानना चाहते हैं?", False),
    ("Done, right?", False),
    ("Just say the word.", False),
    ("I can tell the story if you would like.", False),
    ("Done.", True),
    ('Your note says "are you coming?".', True),
    ("She asked “What is your name?” and left.", True),
    ("The capital? Bengaluru.", True),
    ("I will remind you at seven.", True),
    ("ನಿಮ್ಮ ತಂಗಿ ಕಾವ್ಯ.", True),
    ("You told me that you love filter coffee.", True),
    ("I do not know what you mean.", True),
    ("It opens at nine. You can walk there.", True),
    ('"Should I call you?"', False),  # the whole reply in quotation marks quotes nobody
]


@pytest.mark.parametrize(("text", "passes"), NO_EMOJI)
def test_no_emoji(text: str, passes: bool) -> None:
    assert bind("no_emoji", {})(reply(text)).passed is passes


@pytest.mark.parametrize(("text", "passes"), NO_MARKDOWN)
def test_no_markdown(text: str, passes: bool) -> None:
    assert bind("no_markdown", {})(reply(text)).passed is passes


@pytest.mark.parametrize(("text", "count"), SENTENCES)
def test_max_sentences_counts_as_a_listener_does(text: str, count: int) -> None:
    assert bind("max_sentences", {"n": count})(reply(text)).passed
    if count:
        assert not bind("max_sentences", {"n": count - 1})(reply(text)).passed


@pytest.mark.parametrize(("text", "count"), WORDS)
def test_max_words_counts_words(text: str, count: int) -> None:
    assert bind("max_words", {"n": count})(reply(text)).passed
    if count:
        assert not bind("max_words", {"n": count - 1})(reply(text)).passed


@pytest.mark.parametrize(("text", "passes"), NO_FOLLOW_UP)
def test_no_follow_up_question(text: str, passes: bool) -> None:
    assert bind("no_follow_up_question", {})(reply(text)).passed is passes


def test_every_emoji_of_unicode_is_found() -> None:
    """Oracle: the Unicode property tables themselves, over the whole range."""
    check = bind("no_emoji", {})
    everything = map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x20000)])
    missed = [c for c in everything if regex.match(r"\p{Emoji_Presentation}", c) and check(reply(c)).passed]
    assert missed == []


def test_no_letter_of_any_script_is_an_emoji() -> None:
    letters = "".join(c for c in map(chr, range(0x20, 0xD800)) if regex.match(r"[\p{L}\p{M}\p{N}\p{P}\p{Sc}]", c))
    assert bind("no_emoji", {})(reply(letters)).passed


@pytest.mark.parametrize(
    ("messages", "passes"),
    [
        ([{"content": "Hi."}], True),
        ([{"content": ""}], False),
        ([{"content": None}], False),
        ([{"content": " \n "}], False),
        ([{"content": "..."}], False),
        ([{"content": "😊"}], False),
        ([{"content": "7"}], True),
        ([{"content": "ಹೌದು"}], True),
        ([{"content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}], True),
        ([{"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, {"content": ""}], False),
        ([], False),
        ([{"content": "Wait.", "tool_calls": []}], True),
    ],
)
def test_not_empty(messages: list[dict[str, object]], passes: bool) -> None:
    assert bind("not_empty", {})(Reply(messages)).passed is passes


def test_every_spoken_message_is_judged() -> None:
    """A voice reads the words beside a tool call too."""
    two = Reply([{"content": "Let me look 🔍", "tool_calls": []}, {"content": "It is nine."}])
    assert not bind("no_emoji", {})(two).passed
    assert bind("max_sentences", {"n": 1})(two).passed  # one sentence each


def test_finished_sees_a_reply_cut_at_the_limit() -> None:
    assert bind("finished", {})(reply("a", finish_reason="stop")).passed
    assert not bind("finished", {})(reply("a a a a", finish_reason="length")).passed
    assert not bind("finished", {})(reply("a a a a", finish_reason="repetition")).passed


@pytest.mark.parametrize(
    ("name", "params", "text"),
    [
        ("no_emojis", {}, "did you mean 'no_emoji'"),
        ("max_sentences", {}, "n: Field required"),
        ("max_sentences", {"n": -1}, "greater than or equal to 0"),
        ("max_sentences", {"n": 2, "m": 1}, "Extra inputs"),
        ("no_emoji", {"strict": True}, "parameters: none"),
        ("mentions", {}, "give any or all"),
        ("mentions", {"any": ["…"]}, "no letter or digit"),
        ("calls", {"tool": "f", "arguments": {"a": {"contians": "x"}}}, "Extra inputs"),
        ("calls", {"tool": "f", "arguments": {"a": {"contains": "x", "regex": "y"}}}, "exactly one"),
        ("calls", {"tool": "f", "arguments": {"a": {"regex": "("}}}, "no regular expression"),
    ],
)
def test_wrong_parameters_are_refused_by_name(name: str, params: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=regex.escape(text)):
        bind(name, params)


HOSTILE = [
    "M.G. ",
    "A.",
    "ಎಂ.",
    "one thousand and ",
    "do you know ",
    "a",
    " ",
    "[",
    '{"a":',
    '"',
    "*",
    "if you want ",
    "I can ",
    "\n",
    "<",
    "ನಾನು ",
    ". ",
    "? ",
    "`",
    "> ",
    "- ",
    "1",
    "1. a\n",
]
TEXT_CHECKS = {
    "no_emoji": {}, "no_markdown": {}, "no_follow_up_question": {}, "no_tool_leak": {}, "no_think_leak": {},
    "no_json_leak": {}, "no_role_confusion": {}, "no_prompt_leak": {}, "no_refusal": {}, "not_empty": {},
    "no_fabrication": {"claims": True}, "max_sentences": {"n": 2}, "max_words": {"n": 40},
    "language": {"expected": "en"}, "name_spelling": {"names": ["Rajesh"]}, "mentions": {"any": ["zebra"]},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("piece", HOSTILE)
def test_a_megabyte_of_anything_is_judged_in_seconds(piece: str) -> None:
    said = reply(piece * (1_000_000 // len(piece)))
    for name, params in TEXT_CHECKS.items():
        start = time.perf_counter()
        bind(name, params)(said)
        assert time.perf_counter() - start < 10, name
