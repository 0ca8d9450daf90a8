"""Hand-labelled replies for language, refusal, raw data, length in other languages, and parallel calls."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from qat.behavior.checks import Reply, bind
from qat.behavior.checks.language import LANGUAGES, capitalises_nouns
from qat.behavior.checks.speech import sentences, words
from qat.behavior.checks.tools import _unmatched


def reply(text: str) -> Reply:
    return Reply([{"role": "assistant", "content": text}])


LANGUAGE = [
    ("Huomenna sataa ja tuulee.", "en", False),
    ("Imorgon regnar det hela dagen.", "en", False),
    ("Ngày mai trời sẽ mưa.", "en", False),
    ("Kněz šel domů.", "en", False),  # of a language that is not in the table: letters that English does not write
    ("Idli, dosa, vada, sambar, chutney, pongal, kesari, payasam.", "en", True),
    ("Завтра будет дождь.", "uk", False),
    ("The shop closes at nine tonight.", "en", True),
    ("Der Laden schließt um neun.", "en", False),
    ("Le magasin ferme à neuf heures.", "en", False),
    ("La tienda cierra a las nueve.", "en", False),
    ("ಅಂಗಡಿ ಒಂಬತ್ತಕ್ಕೆ ಮುಚ್ಚುತ್ತದೆ.", "kn", True),
    ("ಅಂಗಡಿ ಒಂಬತ್ತಕ್ಕೆ ಮುಚ್ಚುತ್ತದೆ.", "en", False),
    ("ಅಂಗಡಿ ಒಂಬತ್ತಕ್ಕೆ ಮುಚ್ಚುತ್ತದೆ.", "te", False),
    ("ಅವರು Infosys ನಲ್ಲಿ ಕೆಲಸ ಮಾಡುತ್ತಾರೆ.", "kn", True),
    ("He says namaskara, ನಮಸ್ಕಾರ, to all of them.", "en", True),
    ("అంగడి తొమ్మిదికి మూసేస్తారు.", "te", True),
    ("అంగడి తొమ్మిదికి మూసేస్తారు.", "kn", False),
    ("கடை ஒன்பது மணிக்கு மூடும்.", "ta", True),
    ("கடை ஒன்பது மணிக்கு மூடும்.", "ml", False),
    ("कल दुकान बंद है।", "hi", True),
    ("उद्या दुकान बंद आहे आणि परवा नाही.", "mr", True),
    ("उद्या दुकान बंद आहे आणि परवा नाही.", "hi", False),
    ("मैं घर पर हूँ और वह नहीं है।", "mr", False),
    ("商店九点关门。", "zh", True),
    ("商店九点关门。", "ja", False),
    ("お店は九時に閉まります。", "ja", True),
    ("お店は九時に閉まります。", "zh", False),
    ("Магазин закрывается в девять.", "ru", True),
    ("Крамниця зачиняється о дев'ятій, і це всі знають.", "uk", True),
    ("Крамниця зачиняється о дев'ятій, і це всі знають.", "ru", False),
    ("المحل يغلق في التاسعة.", "ar", True),
    ("این مغازه ساعت نه بسته است.", "fa", True),
    ("این مغازه ساعت نه بسته است.", "ar", False),
    ("Il negozio chiude alle nove, ma non oggi.", "it", True),
    ("Il negozio chiude alle nove, ma non oggi.", "es", False),
    ("A loja fecha às nove, mas não hoje.", "pt", True),
    ("A loja fecha às nove, mas não hoje.", "es", False),
    ("De winkel sluit om negen uur, maar niet vandaag.", "nl", True),
    ("De winkel sluit om negen uur, maar niet vandaag.", "de", False),
    ("Das Wetter ist heute schön.", "de", True),
    ("Il fait beau aujourd'hui.", "fr", True),
    ("42", "kn", True),  # no letter: no language
    ("Filter coffee.", "en", True),
    ("Rajesh Kumar", "de", True),  # a name tells nothing
    ("Kauppa suljetaan tänään kello yhdeksän, koska huomenna vietetään juhlaa.", "en", False),
    ("ร้านปิดเก้าโมง", "th", True),
    ("가게는 아홉 시에 닫아요.", "ko", True),
    ("Το μαγαζί κλείνει στις εννιά.", "el", True),
    ("naanu manege hogtini", "kn", False),  # written in Latin letters: a stated limit
]


@pytest.mark.parametrize(("text", "expected", "passes"), LANGUAGE)
def test_language(text: str, expected: str, passes: bool) -> None:
    assert bind("language", {"expected": expected})(reply(text)).passed is passes


def test_an_unknown_language_is_refused_with_those_known() -> None:
    with pytest.raises(ValueError, match="known: am, ar"):
        bind("language", {"expected": "xx"})
    assert {"kn", "en", "hi", "zh", "ja"} <= set(LANGUAGES)


def test_every_language_has_a_text_that_passes_only_as_itself_or_its_kin() -> None:
    """Oracle: the texts above that pass, against every other expectation of another script."""
    for text, expected, passes in LANGUAGE:
        if not passes or len(words(text)) < 4 or expected not in ("kn", "ta", "te", "ko", "el", "th"):
            continue
        for other in set(LANGUAGES) - {expected}:
            assert not bind("language", {"expected": other})(reply(text)).passed, (text, other)


def test_german_capitals_are_no_names() -> None:
    assert capitalises_nouns("Es sind 24 Grad in der Stadt.")
    assert not capitalises_nouns("It is 24 degrees in the city.")
    assert bind("no_fabrication", {})(reply("Der Himmel ist grau und die Luft ist kalt.")).passed
    assert not bind("no_fabrication", {})(reply("The sky over Mandya is grey.")).passed


NO_REFUSAL = [
    ("I can't do that for you.", False),
    ("I'm unable to share that.", False),
    ("I will not write that.", False),
    ("That is outside my capabilities.", False),
    ("I do not have access to your calendar.", False),
    ("I'm sorry, I cannot discuss elections.", False),
    ("I don't have the capability to order food.", False),
    ("I have to decline that one.", False),
    ("I would rather not say.", False),
    ("I am not able to place calls.", False),
    ("ನಾನು ಅದನ್ನು ಹೇಳಲಾರೆ.", False),
    ("ನನ್ನಿಂದ ಅದು ಆಗುವುದಿಲ್ಲ.", False),
    ("मैं यह काम नहीं कर सकता।", False),
    ("Ich kann das leider nicht tun.", False),
    ("Je ne peux pas répondre à cela.", False),
    ("No puedo hacer eso.", False),
    ("Non posso farlo.", False),
    ("Não posso fazer isso.", False),
    ("抱歉，我不能回答这个问题。", False),
    ("それはお答えできません。", False),
    ("죄송하지만 도와드릴 수 없습니다.", False),
    ("Я не могу это сделать.", False),
    ("I can do that.", True),
    ("I cannot remember the colour.", True),
    ("I can't wait for the weekend.", True),
    ("I can't find your note.", True),
    ("You can't take dogs there.", True),
    ("Kavya cannot come on Sunday.", True),
    ("It could not be saved: the disk is full.", True),
    ("Sorry, that took a while. It is done.", True),
    ("I will not forget the milk.", False),  # reads like one: a promise in the negative is a known false alarm
    ("The search gave nothing.", True),
    ("ನನಗೆ ನೆನಪಿಲ್ಲ.", True),
    ("ಅಂಗಡಿ ಇಂದು ತೆರೆಯುವುದಿಲ್ಲ.", True),
    ("मुझे याद नहीं आ रहा।", True),
    ("Das Geschäft kann heute nicht öffnen.", True),
    ("Ich kann mich nicht daran erinnern.", True),
    ("Je ne peux pas m'en souvenir.", True),
    ("No puedo recordarlo.", True),
    ("Don't worry, I'm here.", True),
    ("Nothing can beat a good dosa.", True),
    ("I am sorry about your day.", True),
]


@pytest.mark.parametrize(("text", "passes"), NO_REFUSAL)
def test_no_refusal(text: str, passes: bool) -> None:
    assert bind("no_refusal", {})(reply(text)).passed is passes


NO_JSON_LEAK = [
    ('{"a": 1}', False),
    ('Sure: {"city": "Mysuru"}.', False),
    ('[{"x": 1}]', False),
    ('["tea", "coffee"]', False),
    ("{'a': 'b'}", False),
    ('"temperature": 24,', False),
    ('{"open', True),  # nothing of an object yet but a brace and a quotation
    ('{"open": tru', False),
    ('{when: "now"}', False),
    ('{ "nested": {"deep": []} }', False),
    ('ಉತ್ತರ: {"ಹೆಸರು": "ಕಾವ್ಯ"}', False),
    ('उत्तर {"नाम": "कविता"}', False),
    ("[[1, 2], [3, 4]]", False),
    ('{"error": null}', False),
    ('x = {"k": false}', False),
    ('Ergebnis: {"ok": true}', False),
    ('{\n"a"\n:\n1}', False),
    ("{'count': 3,", False),
    ('"items": [', False),
    ('{"a":1}{"b":2}', False),
    ("{}", True),
    ("[]", True),
    ("[1, 2, 3]", True),
    ("[sic]", True),
    ("{1, 2}", True),
    ("{name}", True),
    ('She said: "no".', True),
    ('"Tea": his favourite.', True),
    ("for (;;) { run(); }", True),
    ("The ratio 3:4 is fine.", True),
    ("At 5:30, not 6:30.", True),
    ("Title: Home", True),
    ("{{author}}", True),
    ("[1]", True),
    ("a[0] = b", True),
    ("ಸಮಯ: ೫:೩೦", True),
    ("Set {x : x > 0}", True),
    ('He wrote "a" and "b".', True),
    ("JSON is a format.", True),
    ("f = {x: y}", True),
    ("", True),
]


@pytest.mark.parametrize(("text", "passes"), NO_JSON_LEAK)
def test_no_json_leak(text: str, passes: bool) -> None:
    assert bind("no_json_leak", {})(reply(text)).passed is passes


def test_a_deep_bracket_bomb_is_judged_at_once() -> None:
    assert bind("no_json_leak", {})(reply("[" * 3000)).passed


SPOKEN = [
    ("ಡಾ. ಭಟ್ ಬಂದರು. ಶ್ರೀ. ಗೌಡ ಇಲ್ಲ.", 2, 6),
    ("डॉ. शर्मा आए। रु. 50 लगे।", 2, 6),
    ("Das ist z. B. gut. Am 3. Oktober ist frei.", 2, 10),
    ("Son las 5 p. m. de hoy. Bien.", 2, 8),
    ("今天下雨。带伞。", 2, 6),
    ("Tokio は晴れ。", 1, 4),
    ("El Sr. Ruiz llegó.", 1, 4),
    ("It is done. Rest.", 2, 4),
    ("ಬೆಲೆ ರೂ. 50 ಮಾತ್ರ.", 1, 4),
    ("", 0, 0),
]


@pytest.mark.parametrize(("text", "spoken", "heard"), SPOKEN)
def test_sentences_and_words_in_other_languages(text: str, spoken: int, heard: int) -> None:
    assert len(sentences(text)) == spoken
    assert len(words(text)) == heard
    for n in (0, 1, 2, 5):
        assert bind("max_sentences", {"n": n})(reply(text)).passed is (spoken <= n)
        assert bind("max_words", {"n": n})(reply(text)).passed is (heard <= n)


NOTE = {
    "type": "function",
    "function": {"name": "save_note", "parameters": {"type": "object", "properties": {"text": {"type": "string"}}}},
}


def called(*messages: list[str], name: str = "save_note") -> Reply:
    made = [
        {"content": "", "tool_calls": [{"function": {"name": name, "arguments": {"text": text}}} for text in texts]}
        for texts in messages
    ]
    return Reply(made, tools=[NOTE])


def due(*texts: str, **more: Any) -> dict[str, Any]:
    return {"calls": [{"tool": "save_note", "arguments": {"text": {"contains": text}}} for text in texts], **more}


PARALLEL = [
    (called(["milk", "eggs"]), due("milk", "eggs"), True),
    (called(["eggs", "milk"]), due("milk", "eggs"), True),
    (called(["milk"], ["eggs"]), due("milk", "eggs"), False),  # one after the other is not in parallel
    (called(["tea"], ["milk", "eggs"]), due("milk", "eggs"), True),
    (called(["milk", "eggs", "tea"]), due("milk", "eggs"), False),
    (called(["milk", "eggs", "tea"]), due("milk", "eggs", extra=True), True),
    (called(["milk", "milk"]), due("milk", "eggs"), False),
    (called(["milk", "milk"]), due("milk", "milk"), True),
    (called(["milk eggs", "milk"]), due("milk", "eggs"), True),  # a greedy match would give the first to milk
    (called(["milk", "milk eggs"]), due("eggs", "milk"), True),
    (called(["milk", "eggs"], name="other"), due("milk", "eggs"), False),
    (called(), due("milk", "eggs"), False),
    (called([]), due("milk", "eggs"), False),
]


@pytest.mark.parametrize(("made", "params", "passes"), PARALLEL)
def test_parallel_calls(made: Reply, params: dict[str, Any], passes: bool) -> None:
    assert bind("parallel_calls", params)(made).passed is passes


def test_matching_agrees_with_every_permutation() -> None:
    """Oracle: a matching of all rows exists exactly where some choice of distinct columns fits them all."""
    rng = random.Random(3)
    for _ in range(400):
        rows, columns = rng.randint(1, 4), rng.randint(1, 5)
        fits = [[rng.random() < 0.4 for _ in range(columns)] for _ in range(rows)]
        possible = any(
            all(fits[row][column] for row, column in enumerate(chosen))
            for chosen in itertools.permutations(range(columns), rows)
        )
        assert (_unmatched(fits) is None) is possible, fits


def test_one_call_alone_is_not_parallel() -> None:
    with pytest.raises(ValueError, match="check parallel_calls"):
        bind("parallel_calls", due("milk"))
