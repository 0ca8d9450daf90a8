"""How long a reply is when it is spoken: sentences and words, in any script."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated

import regex
from pydantic import Field

from qat.behavior.checks.base import PASSED, CheckResult, Params, Reply, check, failed
from qat.data.text import split_sentences

# `split_sentences` knows the abbreviations of English. These are the others' whose full stop ends no sentence.
_ABBREVIATION = regex.compile(
    r"""(?<![\p{L}\p{M}])(?:
        ಡಾ | ಶ್ರೀ | ಶ್ರೀಮತಿ | ಪ್ರೊ | ರೂ | ಕಿ\.\s?ಮೀ | ಕ್ರಿ\.\s?ಶ | ನಂ | ಬಿ\.ಎಂ
      | डॉ | श्री | प्रो | रु | रू | कि\.\s?मी | ई\.\s?पू | நா | திரு | டாக் | డా | శ్రీ | ഡോ | ডা | ডঃ | ડૉ
      | z\.\s?B | d\.\s?h | u\.\s?a | bzw | ca | Nr | Hr | Fr | Str | usw(?=\.\s\p{Ll}) | evtl | ggf | Tel
      | [ap]\.\s?m(?=\.\s\p{Ll}) | Sra? | Dra | Uds? | p\.\s?ej | EE\.\s?UU | pág | núm
      | Mme | Mlle | p\.\s?ex | av | т\.\s?[едкпн] | г(?=\.\s\p{Ll}) | ул | руб | стр | dott | sig | mevr | dhr | bijv
      )\.(?=\s)""",
    regex.VERBOSE,
)
# Initials and states before a name ("M.G. Road", "the U.S. President"; "the U.S. It" ends a sentence), months, days and
# units before a number or within the sentence, and a pause ("well... never mind").
_WITHIN = regex.compile(
    r"""(?<![\p{L}.])(?:\p{Lu}\.){1,4}\p{Lu}\.(?=\s+(?!(?:The|It|He|She|They|We|You|I|In|On|At|This|That|These|There|But|And|So|A|An
          |My|Your|His|Her|Their|Our|If|When|After|Then|Now|Today|Tomorrow|For|No|Yes|Take|What|Who)\b)\p{Lu})
      | (?<!\p{L})(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.(?=\s[\p{Nd}\p{Ll}])
      | (?<!\p{L})(?:Mon|Tues?|Wed|Thu(?:rs)?|Fri|Sat|Sun)\.(?=\s[\p{Nd}\p{Ll}])
      | (?<!\p{L})(?:min|hrs?|sec|tbsp|tsp|oz|lbs?|km|kg|cm|ft|sq|pp?|Sec|Art|Ch|Vol|Ext)\.(?=\s[\p{Nd}\p{Ll}])
      | (?<![\p{L}\p{M}.])(?:[\p{L}\p{M}--\p{Latin}]{1,4}\.){2,5}(?=\s)
      | (?:\.{2,}|…)(?=\s+\p{Ll})""",
    regex.VERBOSE | regex.VERSION1,
)
_DAY = regex.compile(r"(?<=\b\p{Nd}{1,2})\.(?=\s(?:Jan|Feb|März|Mär|Apr|Mai|Juni?|Juli?|Aug|Sep|Okt|Nov|Dez)\p{Ll}*\b)")
# The scripts that write no space after a sentence.
_UNSPACED = regex.compile(r"(?<=[。！？])(?=[\p{L}\p{N}])|(?<=[.!?।॥][\"”’)\]]?)(?=\p{Han}|\p{Hiragana}|\p{Katakana})")
_ONE_DOT_LEADER = "\u2024"
_PAUSE = "\u2025"


_LONG = 2000
_STOP = regex.compile(r"(?<=[.!?…।॥？！。])[ \t]+")
_ENDLESS = regex.compile(rf"[^\n]{{{_LONG}}}")


def broken_up(text: str) -> str:
    """A text beyond 2,000 characters with a line break after every full stop, and within sentences as long as that.

    What looks for sentences takes quadratic time in the length of a line; whether an abbreviation counts as a sentence
    does not matter in a speech of that length.
    """
    return text if len(text) <= _LONG else _ENDLESS.sub(r"\g<0>\n", _STOP.sub("\n", text))


@lru_cache(maxsize=512)
def sentences(text: str) -> tuple[str, ...]:
    """The sentences of a text as they are spoken, by `qat.data.text.split_sentences` in more languages.

    Full stops of abbreviations ("ಡಾ. ರಾವ್", "z. B.", "M.G. Road"), of German dates ("3. Mai") and of pauses within a
    sentence ("well... never mind") end none; the full stops of Chinese and Japanese do, with no space after them.
    """
    for pattern in (_ABBREVIATION, _WITHIN):
        text = pattern.sub(lambda match: match.group().replace(".", _ONE_DOT_LEADER).replace("…", _PAUSE), text)
    text = _UNSPACED.sub(" ", _DAY.sub(_ONE_DOT_LEADER, text))
    found = split_sentences(broken_up(text))
    return tuple(sentence.replace(_PAUSE, "…").replace(_ONE_DOT_LEADER, ".") for sentence in found)


# A word is a run of letters, marks and digits with inner apostrophes, points, commas or hyphens ("don't", "7:30",
# "well-known"). Scripts without spaces count one word a character, which is near their speaking time.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*"
    r"|[\p{L}\p{N}][\p{L}\p{N}\p{M}\u200C\u200D]*(?:['’.,:-][\p{L}\p{N}][\p{L}\p{N}\p{M}\u200C\u200D]*)*"
)


def words(text: str) -> list[str]:
    """The words of a text."""
    return [match.group() for match in _WORD.finditer(text)]


class Limit(Params):
    """The most that one spoken message may hold."""

    n: Annotated[int, Field(ge=0)]


@check("max_sentences", Limit)
def max_sentences(reply: Reply, params: Limit) -> CheckResult:
    """No message is longer than n sentences."""
    return _at_most(params.n, "sentences", [len(sentences(text)) for text in reply.texts])


@check("max_words", Limit)
def max_words(reply: Reply, params: Limit) -> CheckResult:
    """No message is longer than n words.

    "Well-known", "7:30" and "don't" are one word each. Of the scripts without spaces (Chinese, Japanese, Thai, Lao,
    Khmer, Burmese) every character is one.
    """
    return _at_most(params.n, "words", [len(words(text)) for text in reply.texts])


def _at_most(n: int, unit: str, counts: list[int]) -> CheckResult:
    longest = max(counts, default=0)
    return PASSED if longest <= n else failed(f"{longest} {unit}, at most {n}")
