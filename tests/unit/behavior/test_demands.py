from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qat.behavior.checks.language import likely_language
from qat.behavior.demands import Demands, demands_of
from qat.behavior.suite import load_suite

CASE = {"id": "a", "category": "x", "messages": [{"role": "user", "content": "Hi"}]}


def suite(folder: Path, checks: list[list[dict[str, Any]]]) -> Any:
    cases = [
        {**CASE, "id": f"c{number}", "messages": [{"role": "user", "content": f"question {number}"}], "checks": each}
        for number, each in enumerate(checks)
    ]
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "version": "1", "persona": "annie_tiny", "cases": cases}))
    return load_suite(path)


def test_what_four_of_five_cases_check_is_demanded(tmp_path: Path) -> None:
    always = [{"check": "no_emoji"}, {"check": "max_sentences", "n": 2}]
    checks: list[list[dict[str, Any]]] = [[*always, {"check": "mentions", "any": [str(n)]}] for n in range(5)]
    checks[0][1] = {"check": "max_sentences", "n": 4}  # its own limit: the others' still holds
    for n in (0, 1):
        checks[n] += [{"check": "no_json_leak"}]  # two of five
    found = demands_of([suite(tmp_path, checks)])
    assert found.checks == (("no_emoji", "{}"), ("max_sentences", '{"n": 2}'))
    assert found.turns == tuple((f"c{n}", f"question {n}") for n in range(5))


def test_checks_of_the_case_and_of_the_server_stay_with_the_suite(tmp_path: Path) -> None:
    every = [{"check": "no_call"}, {"check": "max_latency", "seconds": 2}, {"check": "not_empty"}]
    found = demands_of([suite(tmp_path, [every] * 3)])
    assert found.checks == (("not_empty", "{}"),) and found.left_out == ("max_latency",)


def test_judging_a_recorded_reply() -> None:
    demands = demands_of([load_suite("annie_core")])
    assert {name for name, _ in demands.checks} >= {"no_emoji", "no_markdown", "max_sentences", "wrong_tool"}
    prompt = {"role": "system", "content": "You are Annie."}
    context = [prompt, {"role": "user", "content": "What is the largest planet?"}]

    def failing(content: str, calls: Any = None) -> set[str]:
        message = {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})
        return {name for name, _ in demands.judge([message], context, (), ())}

    assert failing("Jupiter.") == set()
    assert failing("**Jupiter** 😀") == {"no_emoji", "no_markdown"}
    assert failing("Jupiter. Saturn. Mars.") == {"max_sentences"}
    call = {"id": "1", "type": "function", "function": {"name": "fly", "arguments": {}}}
    assert "wrong_tool" in failing("", [call])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The weather is fine and there is no rain.", "en"),
        ("Das Wetter ist heute schön und nicht zu kalt.", "de"),
        ("Il fait beau et les enfants sont dans le jardin.", "fr"),
        ("ಇಂದು ಮಳೆ ಬರುತ್ತದೆ", "kn"),
        ("यह किताब मेज पर है", "hi"),
        ("हे पुस्तक टेबलावर आहे", "mr"),
        ("今日は雨です", "ja"),
        ("今天下雨", "zh"),
        ("Сегодня не идёт дождь, и это хорошо", "ru"),
        ("Bengaluru", None),
        ("42!", None),
        ("Please, compute 73 plus 37.", "en"),  # one French word
        ("Ah, I am nervous about tomorrow.", "en"),  # one German word
        ("Convert 20 miles per hour to kilometers per hour.", "en"),
        ("Où est le restaurant le plus proche?", "fr"),
        ("Sie studiert Chemie.", "de"),
    ],
)
def test_likely_language(text: str, code: str | None) -> None:
    assert likely_language(text) == code


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("ನಿಮ್ಮ meeting ನಾಳೆ ten ಗಂಟೆಗೆ start ಆಗುತ್ತದೆ", "kn+Latin"),
        ("The Kannada word for thank you very much is ಧನ್ಯವಾದ.", "en"),  # a word of another script is no mixture
        ("The poem that you have asked for begins so: ಕನ್ನಡ ನಾಡಿನ ಜೀವನದಿ ಈ ಕಾವೇರಿ", "en+Kannada"),
        ("今日は雨です", "ja"),
        ("東京タワーです", "ja"),
        ("12 + 3", None),
    ],
)
def test_mixed_scripts_are_named(text: str, label: str | None) -> None:
    assert Demands((), (), (), ()).language(text) == label


def test_words_are_those_of_max_words() -> None:
    demands = demands_of([load_suite("annie_core")])
    assert demands.words("Well-known facts, of course.") == 4
    assert demands.words("您好，请问我能为您做些什么？") > 5  # no spaces, and yet more than one word


def test_reference_answers_of_cases_and_of_their_judges(tmp_path: Path) -> None:
    judge = {"check": "judge", "criterion": "kind", "url": "http://127.0.0.1:9", "model": "m"}
    path = tmp_path / "suite.yaml"
    cases = [
        {**CASE, "id": "a", "reference": "Jupiter is the largest."},
        {**CASE, "id": "b", "checks": [{**judge, "reference": "Saturn has rings."}, {"check": "not_empty"}]},
        {**CASE, "id": "c", "messages": [], "turns": [{"user": "Hi", "checks": [{**judge, "reference": "Mars."}]},
                                                      {"user": "And now?"}]},
    ]  # fmt: skip
    for case in cases:
        case.setdefault("checks", [{"check": "not_empty"}])
    path.write_text(yaml.safe_dump({"name": "mine", "version": "1", "persona": "annie_tiny", "cases": cases}))
    found = demands_of([load_suite(path)])
    assert found.references == (("a", "Jupiter is the largest."), ("b", "Saturn has rings."), ("c", "Mars."))
    assert found.turns == (("a", "Hi"), ("b", "Hi"), ("c", "Hi"), ("c", "And now?"))
