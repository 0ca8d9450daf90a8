"""Hand-labelled replies for what is said: mentions, names, inventions."""

from __future__ import annotations

import time
from typing import Any

import pytest

from qat.behavior.checks import BoundCheck, CheckError, CheckResult, Reply, bind
from qat.behavior.checks.base import Params
from qat.behavior.checks.names import edit_distance


def reply(text: str, *, user: str = "", tool: str | None = None) -> Reply:
    context = [
        {"role": "system", "content": "You are Annie. Rajesh lives in Bengaluru."},
        {"role": "user", "content": user},
    ]
    return Reply(
        [{"role": "assistant", "content": text}], context=context, tool_results=[tool] if tool is not None else []
    )


MENTIONS = [
    ("It is Filter-Coffee!", {"any": ["filter coffee"]}, True),
    ("Mysuru's palace", {"all": ["mysuru", "palace"]}, True),
    ("Mysuru", {"all": ["mysuru", "palace"]}, False),
    ("I don't remember.", {"any": ["dont remember"]}, True),
    ("I don’t remember.", {"any": ["don't remember"]}, True),
    ("concatenate", {"any": ["cat"]}, False),
    ("at 7:30 pm", {"any": ["7:30"]}, True),
    ("at 17:30", {"any": ["7:30"]}, False),
    ("Dāsara is near", {"any": ["dasara"]}, True),
    ("café", {"any": ["cafe"]}, True),
    ("ಮೈಸೂರಿನಲ್ಲಿ", {"any": ["ಮೈಸೂರಿ"]}, True),  # a case suffix is written on
    ("ಮೈಸೂರು", {"any": ["ಬೆಂಗಳೂರು"]}, False),
    ("೫ ಗಂಟೆ", {"any": ["5"]}, True),
    ("FULL STOP", {"any": ["full  stop"]}, True),
    ("It is 15 rupees", {"any": ["5"]}, False),
    ("", {"any": ["x"]}, False),
    ("a b c", {"any": ["x", "b"], "all": ["a"]}, True),
    ("a c", {"any": ["x", "b"], "all": ["a"]}, False),
    ("ＡＢＣ", {"any": ["abc"]}, True),  # full-width letters
    ("walnut bread, please", {"all": ["walnut bread"]}, True),
    ("It is 1,500 rupees", {"any": ["500"]}, False),  # a figure is one word
    ("It is 1,500 rupees", {"any": ["1500"]}, True),
    ("It is 1500 rupees", {"any": ["1,500"]}, True),
    ("It is 1,20,000 rupees", {"any": ["120000"]}, True),
    ("rows 1,2 and 3", {"any": ["2"]}, True),
    ("2.5 kilos", {"any": ["5 kilos", "2"]}, False),
    ("2.5 kilos", {"any": ["2.5"]}, True),
    ("at 7.30 pm", {"any": ["7:30"]}, True),
    ("at 7:30 pm", {"any": ["7.30"]}, True),
    ("on 12.05.2024", {"all": ["12", "2024"]}, True),
    ("7ಕ್ಕೆ ಬನ್ನಿ", {"any": ["7"]}, True),  # a suffix after a figure
    ("17ಕ್ಕೆ ಬನ್ನಿ", {"any": ["7"]}, False),
    ("Kavyaಗೆ ಹೇಳಿದೆ", {"any": ["kavya"]}, True),
    ("明日東京は雨です", {"any": ["東京"]}, True),  # no spaces between words
    ("พรุ่งนี้ฝนตกที่เชียงใหม่", {"any": ["เชียงใหม่"]}, True),
    ("会议在7点开始", {"any": ["7", "8"]}, True),
    ("会议在7点开始", {"any": ["点开始"]}, True),
    ("会议在17点开始", {"any": ["7"]}, False),
    ("バスは九時です", {"any": ["ハス"]}, False),  # voicing is no accent
    ("мои книги", {"any": ["мой"]}, False),
    ("елка", {"any": ["ёлка"]}, True),
    ("손을 씻으세요", {"any": ["소"]}, False),  # a syllable is a letter, not its strokes
]


@pytest.mark.parametrize(("text", "params", "passes"), MENTIONS)
def test_mentions(text: str, params: dict[str, Any], passes: bool) -> None:
    assert bind("mentions", params)(reply(text)).passed is passes


@pytest.mark.parametrize(
    ("text", "params", "passes"), [(t, {"any": p["any"]}, not ok) for t, p, ok in MENTIONS if "all" not in p]
)
def test_not_mentions_is_the_opposite_on_one_text(text: str, params: dict[str, Any], passes: bool) -> None:
    assert bind("not_mentions", params)(reply(text)).passed is passes


def test_mentions_reads_the_last_text_and_not_mentions_reads_all() -> None:
    two = Reply([{"content": "Looking for the bike."}, {"content": "Nothing."}])
    assert not bind("mentions", {"any": ["bike"]})(two).passed
    assert not bind("not_mentions", {"any": ["bike"]})(two).passed


NAMES = {"names": ["Rajesh", "Bengaluru", "Annie", "Kavya", "ಆನಿ ಶರ್ಮಾ"], "allowed": ["Bangalore"]}
NAME_SPELLING = [
    ("Hello Rajesh.", True),
    ("Hello Rajash.", False),
    ("Hello Rajeesh.", False),
    ("Hello Rjaesh.", False),
    ("Hello Ragesh.", False),
    ("RAJESH is here.", True),
    ("Rajesh's sister Kavya.", True),
    ("Kaviya called.", False),
    ("Kavia called.", False),
    ("Bengalooru is big.", False),
    ("Bengluru is big.", False),
    ("Bangalore is big.", True),
    ("I am Anni.", False),
    ("I am Annye.", False),
    ("Anna and Ravi came.", True),  # two edits on a short name: another name
    ("Any reason? Ankle.", True),
    ("the word rajash in small letters is left alone", True),
    ("Ramesh called.", False),  # one letter: list the friend under allowed
    ("ಶರ್ಮ ಬಂದರು", False),
    ("ಶರ್ಮಾ ಬಂದರು", True),
    ("Mumbai and Delhi.", True),
    ("Bengalurean people", True),  # a word made from the name
    ("Rajeshs are many", True),
]


@pytest.mark.parametrize(("text", "passes"), NAME_SPELLING)
def test_name_spelling(text: str, passes: bool) -> None:
    assert bind("name_spelling", NAMES)(reply(text)).passed is passes


def test_edit_distance_agrees_with_enumeration() -> None:
    """Oracle: all strings one edit away, enumerated by the definition of the edits."""
    word, letters = "abca", "abcd"
    one: set[str] = set()
    for i in range(len(word) + 1):
        one |= {word[:i] + x + word[i:] for x in letters}
        if i < len(word):
            one |= {word[:i] + word[i + 1 :], *(word[:i] + x + word[i + 1 :] for x in letters)}
        if i + 1 < len(word):
            one.add(word[:i] + word[i + 1] + word[i] + word[i + 2 :])
    one.discard(word)
    assert all(edit_distance(word, other) == 1 for other in one)
    assert edit_distance(word, word) == 0
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3


FABRICATION = [
    ("It is a hundred and eighty rupees.", {}, "", "180 rupees", True),
    ("It is one thousand two rupees.", {}, "", "1002 rupees", True),
    ("It is two hundred rupees.", {}, "", "180 rupees", False),
    ("It is 360 rupees both ways.", {}, "", "180 rupees", True),
    ("It is 360 rupees.", {}, "", "180 rupees", False),
    ("That is 30 rupees more.", {}, "", "it was 50, it is 80", True),
    ("Of 1,5 kilos none is left.", {}, "", "3", False),
    ("None is left since 12.05.2024.", {}, "", "3", False),
    ("That leaves 4.5 in total.", {}, "", "1,5 on 12.05.2024, then 1.5 and 3", True),
    ("You parked it by the gate.", {"claims": True}, "Where is it?", "[]", False),
    ("You usually park by the gate.", {"claims": True}, "Where is it?", "[]", False),
    ("You live in Bengaluru.", {}, "", None, True),
    ("You live in Mysuru.", {}, "", None, False),
    ("Your sister Kavya called.", {}, "", None, False),
    ("Your sister Kavya called.", {}, "What did Kavya say?", None, True),
    ("Your sister Kavya called.", {"allowed": ["Kavya"]}, "", None, True),
    ("It is 31 degrees.", {}, "", "31 C, clear", True),
    ("It is 32 degrees.", {}, "", "31 C, clear", False),
    ("It is thirty-one degrees.", {}, "", "31 C", True),
    ("It is thirty-two degrees.", {}, "", "31 C", False),
    ("It opens at 7:30.", {}, "", "opens 7:30", True),
    ("It opens at 7:45.", {}, "", "opens 7:30", False),
    ("It costs 1,250 rupees.", {}, "", "1250", True),
    ("It costs 1,20,000 rupees.", {}, "", "120000", True),
    ("It is 3.50.", {}, "", "3.5", True),
    ("ಅದು ೩೧ ಡಿಗ್ರಿ.", {}, "", "31", True),
    ("ಅದು ೩೨ ಡಿಗ್ರಿ.", {}, "", "31", False),
    ("One of your notes.", {}, "", None, True),
    ("Two notes.", {}, "", "[a]", False),
    ("Monday is fine.", {}, "", None, True),
    ("Priya Sharma called you.", {}, "", None, False),
    ("Priya's house is near.", {}, "", None, False),
    ("Remember to drink water.", {}, "", None, True),
    ("Noted. It is done.", {}, "", None, True),
    ("Everything is fine in Kannada.", {}, "", None, True),
    ("Done, Rajesh.", {}, "", None, True),
    ("The Wodeyar palace.", {"names": False}, "", None, True),
    ("It is 99.", {"numbers": False}, "", None, True),
    ("You told me that you love dosa.", {"claims": True}, "", "[]", False),
    ("I remember your red bike.", {"claims": True}, "", "[]", False),
    ("Last time we met you were happy.", {"claims": True}, "", "[]", False),
    ("As you know, the bike is red.", {"claims": True}, "", "[]", False),
    ("You love filter coffee.", {"claims": True}, "", "[]", False),
    ("Your favourite dish is dosa.", {"claims": True}, "", "[]", False),
    ("I do not remember that.", {"claims": True}, "", "[]", True),
    ("I don't remember anything about your bike.", {"claims": True}, "", "[]", True),
    ("You have not told me about it.", {"claims": True}, "", "[]", True),
    ("I have nothing saved about it.", {"claims": True}, "", "[]", True),
    ("I would remember if you told me.", {"claims": True}, "", "[]", True),
    ("You told me that you love dosa.", {}, "", "dosa", True),
]


@pytest.mark.parametrize(("text", "params", "user", "tool", "passes"), FABRICATION)
def test_no_fabrication(text: str, params: dict[str, Any], user: str, tool: str | None, passes: bool) -> None:
    assert bind("no_fabrication", params)(reply(text, user=user, tool=tool)).passed is passes


def test_a_check_that_is_lost_in_brackets_could_not_judge() -> None:
    def endless(reply: Reply, params: Params) -> CheckResult:
        return endless(reply, params)

    with pytest.raises(CheckError, match="nested too deeply"):
        BoundCheck("endless", Params(), endless)(reply("x"))


def test_a_long_reply_of_sums_is_judged_in_time() -> None:
    started = time.monotonic()
    assert bind("no_fabrication", {})(reply("The total is 30 now. " * 4000, tool="10, 20")).passed
    assert time.monotonic() - started < 4


def test_arguments_of_earlier_calls_are_a_source() -> None:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "set_reminder", "arguments": '{"time": "6:15"}'}}],
    }
    asked = Reply([{"content": "It rings at 6:15."}], context=[{"role": "user", "content": "When?"}, call])
    assert bind("no_fabrication", {})(asked).passed
