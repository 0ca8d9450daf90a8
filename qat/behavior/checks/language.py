"""Check of the language of a reply, by script and, within a script, by its commonest words.

No model and no word list beyond what stands here: a rule that a reader can follow, exact for the languages that own
their script (Kannada, Tamil, Telugu, …). Limits: a transliterated reply (Kannada in Latin letters) counts as the Latin
text it is; Latin-script languages are told apart by function words, so three or four words may say nothing and pass;
among languages that share a script only those of the table are known.
"""

from __future__ import annotations

from collections import Counter

import regex
from pydantic import field_validator

from qat.behavior.checks.base import PASSED, CheckResult, Params, Reply, check, failed

_OWN_SCRIPT = {
    "kn": "Kannada", "ta": "Tamil", "te": "Telugu", "ml": "Malayalam", "gu": "Gujarati", "pa": "Gurmukhi",
    "or": "Oriya", "bn": "Bengali", "si": "Sinhala", "th": "Thai", "lo": "Lao", "km": "Khmer", "my": "Myanmar",
    "ka": "Georgian", "hy": "Armenian", "am": "Ethiopic", "el": "Greek", "he": "Hebrew", "ko": "Hangul",
}  # fmt: skip
_SHARED_SCRIPT = {
    "Latin": {
        "en": "the a an is are was were of to in on at and or it this that you your he she they we i for with not "
        "have has do does did will can be as by from but my his her there here what which who if so all no "
        "yes up its our out now then",
        "de": "der die das ein eine einen dem den des ist sind war und oder nicht ich du er sie es wir ihr mit "
        "für auf zu von im am in an dass auch noch nur heute kein keine mir dir mich dich hat haben wird "
        "kann",
        "fr": "à le la les un une des du de est sont et ou ne pas je tu il elle nous vous ils avec pour sur dans en "
        "que qui ce cette au aux plus mais son sa ses mon votre j' l' d' c' n' s' qu' t' m' y",
        "es": "el la los las un una de del es son y o no que en por para con se su al lo como más pero este esta "
        "hoy mi tu yo te le les muy hay ya me está estoy si mañana",
        "it": "il lo la i gli le un una di del della è sono e o non che in per con si su al come più ma questo "
        "questa oggi domani fa mi ti ci da nel alla ho hai ha",
        "pt": "o a os as um uma de do da dos das é são e ou não que em por para com se no na ao mais mas este "
        "esta hoje amanhã eu você me te seu sua está",
        "nl": "de het een is zijn was en of niet ik je jij hij zij we wij met voor op te van in aan dat ook nog "
        "maar vandaag geen mij er naar bij",
        "sv": "och att det som är jag inte en ett på med har till av för den var han hon vi du om så kan ska idag hela "
        "dagen",
        "fi": "ja on ei se että hän minä sinä oli mutta kun niin tämä koko myös nyt olen ovat mitä",
        "pl": "i nie jest się na że to jak ale czy tak już za od był była będzie przez są ma mnie cały",
        "tr": "ve bir bu da için çok ne ile ama var yok ben sen bugün yarın değil mi olarak gün bütün",
        "id": "dan yang di itu ini dengan untuk tidak ada akan saya kamu anda dari ke besok hari sudah bisa",
        "hu": "a az és nem hogy egy van meg de ez már csak én te ma volt lesz egész nap",
        "vi": "và là có không của một những được tôi bạn anh cho này đó với ngày rất sẽ trời",
        "ro": "și nu este în la că pe un o din cu mai sunt eu tu ce dar azi mâine va toată ziua",
    },
    "Devanagari": {
        "hi": "है हैं था थी थे का की के को में से पर और नहीं यह वह मैं आप हम तुम ने भी कि तो हो गया रहा रही एक "
        "क्या",
        "mr": "आहे आहेत होता होती आणि नाही मध्ये हा ही हे मी तू तुम्ही आम्ही त्या ला ने चा ची चे च्या काय पण एक "
        "झाले",
    },
    "Cyrillic": {
        "ru": "и в не на я что это с он она по но как мы вы ты у за из же от так все был будет есть для о",
        "uk": "і в не на я що це з він вона по але як ми ви ти у за із же від так все був буде є для про та",
    },
    "Arabic": {
        "ar": "في من على إلى هذا هذه أن لا ما هو هي كان قد عن مع أنا أنت هل لم ذلك كل",
        "fa": "است در به از که این آن را با برای من تو شما ما هم نیست بود می یک",
        "ur": "ہے ہیں میں کی کے کا کو سے اور نہیں یہ وہ آپ پر نے تھا ایک بھی ہو",
    },
}  # fmt: skip
_SCRIPT_OF = _OWN_SCRIPT | {code: script for script, known in _SHARED_SCRIPT.items() for code in known}
LANGUAGES = tuple(sorted({*_SCRIPT_OF, "zh", "ja"}))
"""Codes (ISO 639-1) of the languages that the check knows."""

_FURTHER = {
    "Latin": {
        "en": "am i'm me us how when where why much many more some any any very just about per plus please tell let's "
        "after before again into than only were been would could should thank thanks don't it's that's"
    }
}
"""More words of a language that is named without being asked for; no check fails by them."""
_SCRIPTS = sorted({*_SCRIPT_OF.values(), "Han", "Hiragana", "Katakana"})
_LETTER = regex.compile("|".join(rf"(?P<{script}>\p{{Script={script}}}+)" for script in _SCRIPTS))
_TOKEN = regex.compile(r"(?:\p{L}|\p{M})+['’]?")
_COMMA = regex.compile(r"[,、،;:]")
_BEYOND_ASCII = regex.compile(r"[\p{Latin}--\p{ASCII}]", regex.VERSION1)
_COMMON_WORDS = {
    script: {code: frozenset(words.split()) for code, words in known.items()}
    for script, known in _SHARED_SCRIPT.items()
}
_NAMED_BY = _COMMON_WORDS | {
    script: _COMMON_WORDS[script]
    | {code: _COMMON_WORDS[script][code] | set(words.split()) for code, words in more.items()}
    for script, more in _FURTHER.items()
}
_TELLING = {"es": "¿¡ñ", "de": "ß", "pt": "ãõ", "uk": "іїєґ", "ru": "ыэъё", "fa": "پچژگ", "ur": "ٹڈڑںے"}
"""Letters that only one of the languages sharing its script writes; one of them weighs as two common words."""
_HAN_WEIGHT = 3
_TELLING_FROM = 3
"""Fewer words may be a name or a title."""
_LEAD = 0.8
"""How many common words, shared ones in part, another language must have more than the expected one."""
_BESIDE = 0.2
"""Share of the letters from which a second script counts."""
_SILENT_FROM = 8
"""From this many words on, a text without one function word of the expected language is in another."""
_OWN_LETTERS = {
    "en": "", "de": "äöüß", "fr": "àâæçéèêëîïôœùûüÿ", "es": "áéíóúüñ", "it": "àèéìíîòóù", "pt": "áâãàçéêíóôõúü",
    "nl": "áéëèïíóöü", "sv": "åäöé", "fi": "äöåšž", "pl": "ąćęłńóśźż", "tr": "çğıöşüâîû", "id": "é", "hu": "áéíóöőúüű",
    "ro": "ăâîșțşţ",
}  # fmt: skip
"""Letters beyond ASCII of the languages in Latin script; a word with another one is foreign to the text."""
_FOREIGN_FROM = 3
"""From this many words on, a text with a foreign letter and no function word of the expected language is in another."""
_LISTED = 2 / 5
"""A text in which a comma follows that share of the words lists things: lists have no function words."""


class Language(Params):
    """The language that the reply must be in, as an ISO 639-1 code."""

    expected: str

    @field_validator("expected")
    @classmethod
    def _known(cls, code: str) -> str:
        if code not in LANGUAGES:
            raise ValueError(f"{code!r} is not known; known: {', '.join(LANGUAGES)}")
        return code


@check("language", Language)
def language(reply: Reply, params: Language) -> CheckResult:
    """Every text is, for the most part, in the expected language; names and single foreign words may stand in it.

    A text without letters is in no language and passes.
    """
    for text in reply.texts:
        if found := _other_language(text, params.expected):
            return failed(found)
    return PASSED


def _other_language(text: str, expected: str) -> str | None:
    letters = _letters(text)
    total = sum(letters.values())
    if not total:
        return None
    if expected in ("zh", "ja"):
        kana, han = letters["Hiragana"] + letters["Katakana"], letters["Han"]
        mine = kana + han
        # Japanese writes its grammar in kana; a few characters without any may be either language.
        if expected == "zh" and 4 * kana > mine:
            return "Japanese, not zh"
        if expected == "ja" and kana == 0 and mine > 4 * _HAN_WEIGHT:
            return "Chinese, not ja"
    else:
        mine = letters[_SCRIPT_OF[expected]]
    if 2 * mine < total:
        return f"{letters.most_common(1)[0][0]} script, not {expected}"
    known = _COMMON_WORDS.get(_SCRIPT_OF.get(expected, ""))
    return _by_words(text, expected, known) if known else None


def _letters(text: str) -> Counter[str]:
    """Letters by script; a Han character weighs as the letters of the syllable that it is."""
    count: Counter[str] = Counter()
    for match in _LETTER.finditer(text):
        script = str(match.lastgroup)
        count[script] += len(match.group()) * (_HAN_WEIGHT if script == "Han" else 1)
    return count


def _by_words(text: str, expected: str, known: dict[str, frozenset[str]]) -> str | None:
    words = _words(text)
    if len(words) < _TELLING_FROM:
        return None
    weight = _weights(text, words, known)
    best = max(weight, key=lambda code: weight[code])
    if weight[best] > weight[expected] + _LEAD:
        return f"{best}, not {expected}"
    listed = len(_COMMA.findall(text)) >= _LISTED * len(words)
    enough = _FOREIGN_FROM if _foreign(text, expected) else _SILENT_FROM
    if len(words) >= enough and weight[expected] == 0 and not listed:
        return f"none of the commonest words of {expected}"
    return None


def _foreign(text: str, expected: str) -> bool:
    """Whether a Latin letter stands in the text that the language does not write."""
    own = _OWN_LETTERS.get(expected)
    return own is not None and any(char not in own for char in _BEYOND_ASCII.findall(text.casefold()))


def _words(text: str) -> list[str]:
    return [word.replace("’", "'") for word in _TOKEN.findall(text.casefold())]


def _weights(text: str, words: list[str], known: dict[str, frozenset[str]]) -> dict[str, float]:
    weight = {code: 2.0 * any(mark in text for mark in _TELLING.get(code, "")) for code in known}
    for word in words:
        # "a", "la", "in" are words of several languages: each gets its part.
        owners = [code for code, common in known.items() if word in common]
        for code in owners:
            weight[code] += 1 / len(owners)
    return weight


def likely_language(text: str) -> str | None:
    """The language that most of the text is in, of those in `LANGUAGES`; None where it says too little.

    Languages that share a script are told apart by their commonest words, so a name or a title is in none.
    """
    letters = _letters(text)
    if not letters:
        return None
    script = letters.most_common(1)[0][0]
    if script in ("Han", "Hiragana", "Katakana"):
        return "ja" if letters["Hiragana"] + letters["Katakana"] else "zh"
    if script not in _COMMON_WORDS:
        return next(code for code, own in _OWN_SCRIPT.items() if own == script)
    words = _words(text)
    weight = _weights(text, words, _NAMED_BY[script])
    ranked = sorted(weight, key=lambda code: -weight[code])
    told = len(words) >= _TELLING_FROM and weight[ranked[0]] > weight[ranked[1]]
    return ranked[0] if told else None


def scripts_beside(text: str) -> list[str]:
    """Names of further scripts in which at least a fifth of the letters stands; the three of Japanese count as one."""
    letters = _letters(text)
    if not letters:
        return []
    main, total = letters.most_common(1)[0][0], letters.total()
    others = [script for script, count in letters.most_common() if script != main and count >= _BESIDE * total]
    return [script for script in others if not {script, main} <= {"Han", "Hiragana", "Katakana"}]


def capitalises_nouns(text: str) -> bool:
    """Whether the text is German, where a capital letter makes no name."""
    known = _COMMON_WORDS["Latin"]
    words = _TOKEN.findall(text.casefold())
    german = sum(word in known["de"] for word in words)
    return german > sum(word in known["en"] for word in words)
