"""Folding of texts, and names.

Two spellings that a listener takes for the same are the same; one letter off is a name error.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Annotated

import regex
from pydantic import Field

from qat.behavior.checks.base import PASSED, CheckResult, Params, Reply, check, failed

# Latin accents belong to no script of their own; vowel signs of Kannada and Devanagari do, and they stay. So do the
# marks that make another letter: the voicing of kana, and the breve of й and ў.
_ACCENT = regex.compile(
    r"[[\p{Mn}&&\p{Script=Inherited}]--[\u0306\u3099\u309A]]|(?<![иу])\u0306|[\u200C\u200D]", regex.VERSION1
)
_POSSESSIVE = regex.compile(r"['’]s\b")
_APOSTROPHE = regex.compile(r"(?<=\w)['’](?=\w)")
_BETWEEN = regex.compile(r"[^\p{L}\p{N}\p{M}]+")


@lru_cache(maxsize=8192)
def fold(text: str) -> str:
    """Reduce a text to what is compared.

    No case, no Latin accents, no punctuation, single spaces, no possessive 's, ASCII digits.
    """
    text = unicodedata.normalize("NFKD", text).casefold()
    text = _ACCENT.sub("", text)
    text = _APOSTROPHE.sub("", _POSSESSIVE.sub("", text))
    text = "".join(str(unicodedata.digit(char)) if char.isdigit() and not char.isascii() else char for char in text)
    return str(_BETWEEN.sub(" ", text)).strip()


_THOUSANDS = regex.compile(r"(?<![\p{Nd}.,])\p{Nd}{1,3}(?:,\p{Nd}{2,3})*,\p{Nd}{3}(?!,?\p{Nd})")
_POINT = regex.compile(r"(?<![\p{Nd}.])(\p{Nd}+)\.(?=\p{Nd}+(?!\.?\p{Nd}))")
_DOT = "\ua78f"
"""A dot that Unicode has among the letters: with it between its digits a figure is one word."""


@lru_cache(maxsize=8192)
def fold_figures(text: str) -> str:
    """`fold`, with every figure one word: "1,500" is 1500, and "2.5" is neither 2 nor 5."""
    text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    return unicodedata.normalize("NFC", fold(_POINT.sub(rf"\1{_DOT}", text)))


def mentions_phrase(folded: str, phrase: str) -> bool:
    """Whether a text of `fold_figures` holds a phrase as whole words.

    A phrase that ends in a script with case suffixes written on (Kannada, Devanagari and others beyond Latin) may go
    on; in a script without spaces (Chinese, Japanese, Thai) it may also stand within others. A point and a colon
    between digits are the same ("7.30", "7:30").
    """
    pattern = _phrase(phrase)
    return pattern is not None and pattern.search(folded) is not None


_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")
_GAP = regex.compile(rf"(?<=\p{{Nd}})[ {_DOT}](?=\p{{Nd}})")


@lru_cache(maxsize=8192)
def _phrase(phrase: str) -> regex.Pattern[str] | None:
    wanted = fold_figures(phrase)
    if not wanted:
        return None
    start = "" if _UNSPACED.match(wanted) else rf"(?<![[\p{{L}}\p{{N}}\p{{M}}]--{_UNSPACED.pattern}])"
    # A suffix of another script may follow letters and digits too ("7ಕ್ಕೆ").
    end = r"(?![\p{Latin}\p{N}\p{M}])" if regex.match(r"[\p{Latin}\p{N}]", wanted[-1]) else ""
    inner = _GAP.sub(f"[ {_DOT}]", regex.escape(wanted, literal_spaces=True))
    return regex.compile(start + inner + end, regex.VERSION1)


class NameSpelling(Params):
    """Names that must be spelt right, and words near them that are meant."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    allowed: tuple[str, ...] = ()


_WORD = regex.compile(r"[\p{L}][\p{L}\p{M}\u200C\u200D]*")


@check("name_spelling", NameSpelling)
def name_spelling(reply: Reply, params: NameSpelling) -> CheckResult:
    """No capitalised word is a near miss of a name.

    Near is one edit (insertion, deletion, substitution, swap of neighbours), or two for names of six letters and more
    with the same first letter, or another spelling of the same sound ("Anny"). Another person's name that is that near
    ("Rakesh" beside "Rajesh") belongs under `allowed`. Words of fewer than four letters are too short to tell. Scripts
    without capitals are all looked at.
    """
    right = {part for name in (*params.names, *params.allowed) for part in fold(name).split()}
    names = {part for name in params.names for part in fold(name).split() if len(part) >= 4}
    for text in reply.texts:
        for match in _WORD.finditer(_POSSESSIVE.sub("", text)):
            word = fold(match.group())
            if len(word) < 4 or word in right or match.group()[0].islower():
                continue
            for name in sorted(names):
                if _near(word, name):
                    return failed(f"{match.group()!r} for {name!r}")
    return PASSED


# What grammar may write onto a whole name: plurals and peoples in Latin script.
_SUFFIX = regex.compile(r"s|es|n|an|ans|ean|eans|ite|ites")
_LATIN = regex.compile(r"\p{Latin}")
_MARK = regex.compile(r"\p{M}")
_DOUBLED = regex.compile(r"(.)\1+")
_VIRAMA = "\u0ccd\u094d\u0bcd\u0c4d\u0d4d\u09cd\u0acd"


def _near(word: str, name: str) -> bool:
    if abs(len(word) - len(name)) > 2 or _inflected(word, name):
        return False
    if _LATIN.match(name) and _sound(word) == _sound(name):
        return True
    distance = edit_distance(word, name)
    return distance == 1 or (distance == 2 and len(name) >= 6 and word[0] == name[0])


def _inflected(word: str, name: str) -> bool:
    """Whether the word is the name with an ending, which is grammar and no misspelling.

    Indian scripts write case endings on, and drop the virama of a final consonant before them; a vowel sign alone on
    the end is a letter too many.
    """
    if _LATIN.match(name):
        return word.startswith(name) and _SUFFIX.fullmatch(word[len(name) :]) is not None
    stem = name.rstrip(_VIRAMA)
    ending = word[len(stem) :]
    return word.startswith(stem) and len(ending) > 0 and not _MARK.fullmatch(ending)


@lru_cache(maxsize=8192)
def _sound(word: str) -> str:
    """A spelling without what is not heard: doubled letters, y for i, a final e."""
    word = word.replace("aa", "a").replace("ee", "i").replace("oo", "u").replace("ph", "f").replace("y", "i")
    return str(_DOUBLED.sub(r"\1", word)).removesuffix("e")


def edit_distance(a: str, b: str) -> int:
    """Optimal string alignment distance: insertions, deletions, substitutions and swaps of neighbours cost 1."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        before, row, above = row, [i] + [0] * len(b), before
        for j, right in enumerate(b, start=1):
            row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                row[j] = min(row[j], above[j - 2] + 1)
    return row[-1]
