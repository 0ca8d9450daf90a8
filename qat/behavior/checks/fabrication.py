"""Check that a reply invents nothing: no number, no name, no memory that it was not given."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache
from itertools import combinations

import regex

from qat.behavior.checks.base import PASSED, CheckResult, Params, Reply, check, failed
from qat.behavior.checks.language import capitalises_nouns
from qat.behavior.checks.names import fold
from qat.behavior.checks.speech import sentences


class NoFabrication(Params):
    """What is looked for beyond the context.

    Attributes:
        allowed: Further words and numbers that are no invention (general knowledge the case asks for).
        numbers: Look at numbers.
        names: Look at names (capitalised words of Latin script).
        claims: Look at claims to remember; for cases in which the memory is empty.
    """

    allowed: tuple[str, ...] = ()
    numbers: bool = True
    names: bool = True
    claims: bool = False


@check("no_fabrication", NoFabrication)
def no_fabrication(reply: Reply, params: NoFabrication) -> CheckResult:
    """Every number and name of the texts stands in the messages, the tool results or `allowed`.

    Numbers compare by value ("ten" is 10, Kannada digits are digits; "one" is mostly a pronoun and is left out); a sum
    or difference of two that the reply calls one ("both ways", "more than") is no invention. A name is a capitalised
    word inside a sentence, or at its beginning where another capitalised word, a possessive or a verb of persons
    follows.
    """
    context = "\n".join(_context(reply, params))
    known_words, known_numbers = _known_of(context)
    for text in reply.texts:
        if params.claims and (claim := _claim(text)):
            return failed(f"claims a memory: {claim}")
        if params.numbers and (number := _invented(text, known_numbers)):
            return failed(f"number {number} is in no source")
        if params.names and not capitalises_nouns(text):
            for name in _names(text):
                if not _known(name, known_words):
                    return failed(f"name {name!r} is in no source")
    return PASSED


@lru_cache(maxsize=256)
def _known_of(context: str) -> tuple[frozenset[str], frozenset[str]]:
    """Words and numbers of a context, which many cases and all their repeats share."""
    return frozenset(fold(context).split()), frozenset(_numbers(_ONE.sub("1", context)))


def _context(reply: Reply, params: NoFabrication) -> Iterator[str]:
    for message in reply.context:
        yield str(message.get("content") or "")
        for call in message.get("tool_calls") or ():
            yield json.dumps(call.get("function", {}).get("arguments"), ensure_ascii=False)
    yield from reply.tool_results
    yield from params.allowed


def _words(text: str) -> list[str]:
    return text.split()


_UNITS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = dict(zip(_words("twenty thirty forty fifty sixty seventy eighty ninety"), range(20, 100, 10), strict=True))
_NUMBER_WORDS = {word: value for value, word in enumerate(_UNITS) if word != "one"} | _TENS
_ANY_WORD = "|".join(sorted(_NUMBER_WORDS, key=len, reverse=True))
_TENS_UNIT = regex.compile(rf"\b({'|'.join(_TENS)})[- ]({'|'.join(_UNITS[1:10])})\b", regex.IGNORECASE)
_NUMBER = regex.compile(rf"\p{{Nd}}+(?:[.,:]\p{{Nd}}+)*|\b(?:{_ANY_WORD})\b", regex.IGNORECASE)


_ONE = regex.compile(r"\bone\b", regex.IGNORECASE)
_LARGE = regex.compile(
    rf"(?=\b(?:a|one|\d{{1,3}}|{_ANY_WORD})[\s-]+(?:hundred|thousand)\b)"
    rf"\b(?:(?P<thousands>a|one|\d{{1,3}}|{_ANY_WORD})[\s-]+thousand\b)?"
    rf"(?:(?:(?<=thousand),?\s+(?:and\s+)?)?(?P<hundreds>a|one|\d|{_ANY_WORD})[\s-]+hundred\b)?"
    rf"(?:(?<=hundred|thousand),?\s+(?:and\s+)?(?P<rest>\d{{1,2}}|{_ANY_WORD})\b(?!\s+(?:hundred|thousand)))?",
    regex.IGNORECASE,
)
_FOLLOWS = regex.compile(
    r"\b(?:more|less|fewer|difference|total|together|altogether|in\s+all|sum|both\s+ways|each\s+way|return|left|remain\w*|half"
    r"|twice|double|change|saves?)\b",
    regex.IGNORECASE,
)
"""Words of a sentence that says what it has calculated."""
_MOST_SUMMED = 40
"""Of so many numbers pairs are formed; in a longer context hardly any number would be left."""
_THOUSANDS = regex.compile(r"\d{1,3}(?:,\d{2,3})+(?:\.\d+)?")
_PLAIN = regex.compile(r"\d+(?:\.\d+)?")


def _numbers(text: str) -> Iterator[str]:
    """Numbers of a text in one form: ASCII digits, no leading zeros or thousands separators; "7:30" gives 7 and 30."""
    text = _TENS_UNIT.sub(lambda m: str(_TENS[m[1].casefold()] + _UNITS.index(m[2].casefold())), text)
    text = _LARGE.sub(_large, text)
    for match in _NUMBER.finditer(text):
        word = match.group().casefold()
        if word in _NUMBER_WORDS:
            yield str(_NUMBER_WORDS[word])
            continue
        digits = "".join(str(unicodedata.digit(char)) if char.isdigit() else char for char in word)
        if _THOUSANDS.fullmatch(digits):
            digits = digits.replace(",", "")
        for part in digits.split(":"):
            whole, _, decimals = part.partition(".")
            whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
            yield f"{whole}.{decimals}" if decimals else whole


def _large(match: regex.Match[str]) -> str:
    """Hundreds and thousands in words as one number: "a hundred and eighty" is 180."""

    def value(word: str | None) -> int:
        word = (word or "0").casefold()
        return 1 if word in ("a", "one") else _NUMBER_WORDS.get(word) or int(word if word.isdigit() else 0)

    return str(1000 * value(match["thousands"]) + 100 * value(match["hundreds"]) + value(match["rest"]))


def _invented(text: str, known: frozenset[str]) -> str | None:
    """The first number that is neither known nor calculated from known ones by a sentence that says so."""
    unknown = [number for number in dict.fromkeys(_numbers(text)) if number not in known]
    if not unknown:
        return None
    calculating = {number for each in sentences(text) if _FOLLOWS.search(each) for number in _numbers(each)}
    results = _results(known) if calculating else frozenset()
    return next((n for n in unknown if n not in calculating or _value(n) not in results), None)


def _value(number: str) -> Decimal | None:
    """The value of a number; None of a date ("12.05.2024") or a decimal comma, which no sum is made of."""
    return Decimal(number) if _PLAIN.fullmatch(number) else None


@lru_cache(maxsize=256)
def _results(known: frozenset[str]) -> frozenset[Decimal]:
    """The known numbers added up, doubled and halved, and the sums and differences of any two."""
    values = [value for each in sorted(known) if (value := _value(each)) is not None][:_MOST_SUMMED]
    results = {sum(values, Decimal())} | {2 * a for a in values} | {a / 2 for a in values}
    return frozenset(results | {abs(a + sign * b) for a, b in combinations(values, 2) for sign in (1, -1)})


_CAPITAL = regex.compile(r"\b\p{Lu}[\p{L}\p{M}'’]*(?<!['’])")
_ANY_LETTER = regex.compile(r"[\p{L}\p{N}]")
_POSSESSIVE = regex.compile(r"['’]s?$")
_FOLLOWER = regex.compile(r"\s+(\p{Lu}[\p{L}\p{M}]+)")
# Capitalised in English without being anybody's name.
_COMMON = frozenset(
    _words(
        "i i'm i'll i've i'd ok okay am pm a.m p.m monday tuesday wednesday thursday friday saturday sunday "
        "january february march april may june july august september october november december mon tue wed "
        "thu fri sat sun english kannada hindi indian tv id usb pdf wi-fi wifi ist rs god dr mr mrs ms sir"
    )
)
_PERSON_VERBS = _words(
    "is was has said says told called calls asked asks works worked lives lived likes liked loves loved plays "
    "played wants wanted moved married went came will sent gave texted emailed visited suggested recommended"
)
_ACTS = regex.compile(rf"\s+(?:{'|'.join(_PERSON_VERBS)})\b")
# Sentence openers that such verbs follow without naming anybody.
_OPENERS = frozenset(
    _words(
        "it this that he she they you we there here what who which everything nothing everyone nobody someone "
        "something anything all one your his her their my our its the a an today tomorrow tonight yesterday "
        "now then so and but yes no sure done noted right memory both none neither either if when where how "
        "why because as at in on by for with from to of not just also maybe perhaps sorry thanks great"
    )
)


def _names(text: str) -> Iterator[str]:
    for sentence in sentences(text):
        first = True
        for match in _CAPITAL.finditer(sentence):
            word = match.group()
            opens = first and not _ANY_LETTER.search(sentence, 0, match.start())
            first = False
            bare = _POSSESSIVE.sub("", word).casefold()
            if bare in _COMMON or word.casefold() in _COMMON or len(bare) < 2:
                continue
            if opens and not _opens_with_name(word, bare, sentence[match.end() :]):
                continue
            yield _POSSESSIVE.sub("", word)


def _opens_with_name(word: str, bare: str, rest: str) -> bool:
    if bare in _OPENERS:
        return False
    follower = _FOLLOWER.match(rest)
    return (
        word.endswith(("'s", "’s"))
        or _ACTS.match(rest) is not None
        or (follower is not None and follower[1].casefold() not in _COMMON)
    )


def _known(name: str, words: frozenset[str]) -> bool:
    return all(part in words or part.rstrip("s") in words for part in fold(name).split())


_CLAIM = regex.compile(
    r"""\byou(?:['’]ve|\s+have)?\s+(?:once\s+|already\s+|also\s+|just\s+)?(?:told|said|mentioned|shared|asked
      |noted|saved)\b
      | \bI\s+(?:do\s+|still\s+|clearly\s+|definitely\s+)?(?:remember|recall)\b
      | \b(?:last\s+time|the\s+other\s+day|as\s+(?:you\s+know|always|usual)|we\s+(?:talked|spoke|discussed|chatted))\b
      | \b(?:my|your|the)\s+(?:notes?|memory|records?)\s+(?:say|says|show|shows|mention|mentions)\b
      | \byou(?:['’]re|\s+are)?\s+(?:usually|always|often|really|absolutely)?\s*
        (?:like|likes|love|prefer|enjoy|adore|hate|allergic\s+to|fond\s+of)\b
      | \byour\s+favou?rite\b[^.?!]{0,80}\bis\b
      | \b(?:earlier|before|yesterday|last\s+(?:week|month|year|night|\p{L}+day))\b.{0,120}\byou\b
      | \byou\s+(?:bought|sold|own|owned|wanted|visited|went|met|used\s+to|have\s+a|left|put|kept|took|drove|lost
        |parked|placed|stored|ordered|booked|called|moved|lived|worked|stayed)\b
      | \byou\s+(?:usually|always|often|normally|typically|mostly|tend\s+to)\s+\p{L}
      | \bin\s+(?:your|my)\s+memory\s*: | \bit\s+is\s+the\b.{0,120}\byou\s
      | ಹೇಳಿದ್ದಿ|ಹೇಳಿದ್ರಿ|ಹೇಳಿದ್ದೀರಿ|ತಿಳಿಸಿದ್ದಿ|ನೆನಪಿದೆ|ನಿಮಗೆ\s.{0,80}ಇಷ್ಟ | (?:बताया|कहा|बोला)\s+था|याद\s+है|आपको\s.{0,80}पसंद
      | \b(?:du\s+hast|sie\s+haben)\s+(?:mir\s+)?.{0,80}\b(?:gesagt|erzählt|erwähnt)\b | \bich\s+erinnere\s+mich\b
      | \b(?:m['’](?:avez|as)|tu\s+as|vous\s+avez)\s+(?:\w+\s+)?(?:dit|parlé|raconté|mentionné)\b
        | \bje\s+me\s+souviens\b
      | \bme\s+(?:dijiste|contaste|dijo|contó|mencionaste)\b | \b(?:lo\s+)?recuerdo\b
      | சொன்னீர்கள்|நினைவிருக்கிறது|మీరు\s.{0,80}చెప్పారు|గుర్తుంది|你(?:说过|告诉过我)|我记得|言っていました|覚えています""",
    regex.VERBOSE | regex.IGNORECASE,
)
_DENIAL = regex.compile(
    r"\b(?:not|no|never|nothing|none|cannot|without|yet\s+to|if|unless|whether|nicht|nichts|kein\w*|pas|rien|aucun\w*|ne|nunca|nada)\b"
    r"|n['’]t\b|\bn['’]|ಇಲ್ಲ|ಿಲ್ಲ|नहीं|இல்லை|లేదు|不|没|ません|ない",
    regex.IGNORECASE,
)


def _claim(text: str) -> str | None:
    """The sentence that claims to remember; one that denies or sets a condition ("if you told me") claims nothing."""
    for sentence in sentences(text):
        if _CLAIM.search(sentence) and not _DENIAL.search(sentence):
            return sentence
    return None
