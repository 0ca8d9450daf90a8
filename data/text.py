"""Detectors of manners in a spoken reply: emoji, markdown, a question back to the user, the number of sentences.

The audit uses them on training data and the behaviour suite on answers, so that the data cannot teach what the suite
forbids. They are rules over characters, made for replies of a few sentences in English with Indian names and Kannada
script.
"""

from __future__ import annotations

import regex

# Emoji_Presentation are shown as pictures by default; other pictographs become one through U+FE0F. The symbols
# U+2600..27BF (hearts, suns, ticks) are pictures on every phone even without it. (c), (R) and TM are pictographs by
# Unicode but are plain text here.
_EMOJI = regex.compile(
    r"""[\p{Emoji_Presentation}\p{Emoji_Modifier}\U0001F1E6-\U0001F1FF]
      | \p{Extended_Pictographic}\uFE0F
      | [[\u2600-\u27BF]&&\p{Extended_Pictographic}]
      | [0-9\#*]\uFE0F?\u20E3""",
    regex.VERBOSE | regex.VERSION1,
)

_MARKDOWN: dict[str, regex.Pattern[str]] = {
    "code fence": regex.compile(r"^\s*(?:```|~~~)", regex.MULTILINE),
    "heading": regex.compile(r"^ {0,3}#{1,6}[ \t]+\S", regex.MULTILINE),
    "bold": regex.compile(r"\*\*(?=\S)|(?<![\w_])__(?=[^\s_])"),
    # CommonMark takes 5*3*2 for emphasis; here it is arithmetic.
    "italic": regex.compile(
        r"(?<![\d*])\*(?=[^\s*])[^*\n]*(?<=[^\s*])\*(?![\d*])|(?<![\w_])_(?=[^\s_])[^_\n]*(?<=[^\s_])_(?![\w_])"
    ),
    "strikethrough": regex.compile(r"~~(?=\S)[^~\n]+~~"),
    "bullet list": regex.compile(r"^\s*[-*+•][ \t]+\S", regex.MULTILINE),
    # One line that begins with "7. " may be a spoken number; a list has two items.
    "numbered list": regex.compile(r"^\s*\d{1,2}[.)][ \t]+\S[^\n]*\n+\s*\d{1,2}[.)][ \t]+\S", regex.MULTILINE),
    "block quote": regex.compile(r"^ {0,3}>[ \t]?\S", regex.MULTILINE),
    "table": regex.compile(r"^\s*\|.*\|\s*$", regex.MULTILINE),
    "rule": regex.compile(r"^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$", regex.MULTILINE),
    "inline code": regex.compile(r"(?<!`)`(?!`)[^`\n]+`(?!`)"),
    "link": regex.compile(r"!?\[[^\]\n]+\]\([^)\s]+\)"),
    "html": regex.compile(r"</?(?:b|i|u|br|hr|p|ul|ol|li|em|strong|code|pre|table|h[1-6])\b[^<>]*>", regex.IGNORECASE),
}

_CLOSERS = "\"'”’)]»"
_ENDERS = ".!?…।॥？！。"
_QUESTION_MARKS = "?？؟"
# Abbreviations whose full stop does not end a sentence; "a.m." and "p.m." end one where a capital follows.
_NEVER_LAST = regex.compile(
    r"approx|capt|col|dept|dr|e\.g|fig|gen|hon|i\.e|jr|lt|mr|mrs|ms|mt|no|prof|rev|rs|shri|smt|sr|sri|st|vs",
    regex.IGNORECASE,
)
_MAYBE_LAST = regex.compile(r"a\.m|p\.m|etc|inc|ltd|co|u\.s|u\.k", regex.IGNORECASE)

_OFFER = regex.compile(
    r"""\b(?:would|do|did|shall|should|can|could|may|will|want)\s+(?:you|i|we|me)\b[^.!?]*[?？]
      | \b(?:want|need)\s+me\s+to\b
      | \blet\s+me\s+know\s+(?:if|what|which|when|whether|how)\b
      | \b(?:anything|something)\s+else\b[^.!]*(?:[?？]|\bhelp\b)
      | \bhow\s+(?:can|may)\s+i\s+(?:help|assist)\b
      | \bfeel\s+free\s+to\s+ask\b
      | \bjust\s+(?:ask(?=\s+me\b|\s*[.!]|\s*$)|say\s+the\s+word\b)""",
    regex.VERBOSE | regex.IGNORECASE,
)


def find_emoji(text: str) -> list[str]:
    """Return every emoji character (or keycap) of the text, in order."""
    return [match.group() for match in _EMOJI.finditer(text)]


def find_markdown(text: str) -> list[str]:
    """Return the names of the markdown constructs in the text (keys such as `bold`, `bullet list`), each once."""
    return [name for name, pattern in _MARKDOWN.items() if pattern.search(text)]


def split_sentences(text: str) -> list[str]:
    """Split a reply into sentences.

    A sentence ends at . ! ? … । (and closing quotes) before white space or the end, and at a line break. Full stops of
    titles, initials, decimals and times of day do not end one.

    Returns:
        The sentences, trimmed; pieces without a letter or a digit (a lone emoji) do not count.
    """
    sentences: list[str] = []
    for line in text.splitlines():
        start = 0
        for match in regex.finditer(rf"[{_ENDERS}]+[{regex.escape(_CLOSERS)}]*(?=\s|$)", line):
            if _ends_sentence(line, match.start(), match.end()):
                sentences.append(line[start : match.end()])
                start = match.end()
        sentences.append(line[start:])
    return [piece.strip() for piece in sentences if regex.search(r"[\p{L}\p{N}]", piece)]


def _ends_sentence(line: str, stop: int, after: int) -> bool:
    if line[stop] != "." or line[stop : stop + 2] == "..":
        return True
    word = regex.split(r"[\s(\"'“‘]", line[max(0, stop - 40) : stop])[-1]  # no abbreviation is longer
    if _NEVER_LAST.fullmatch(word) or (len(word) == 1 and word.isupper()):
        return False
    if _MAYBE_LAST.fullmatch(word):
        following = line[after:].lstrip()[:1]
        return not following or following.isupper()
    return True


def count_sentences(text: str) -> int:
    """Number of sentences of the text by `split_sentences`."""
    return len(split_sentences(text))


def find_follow_up(text: str) -> str | None:
    """Return the sentence that asks the user back, or None.

    That is the last sentence where it is a question (not one inside a quotation), or any sentence that offers more
    ("Would you like …?", "Want me to …", "Let me know if …", "Anything else …?").
    """
    sentences = split_sentences(text)
    for sentence in sentences:
        if _OFFER.search(sentence) and not _quoted_question(sentence):
            return sentence
    if not sentences:
        return None
    last = sentences[-1]
    bare = regex.sub(r"[\s\p{So}\p{Emoji_Presentation}\uFE0F*_)]+$", "", last)
    return last if bare[-1:] in _QUESTION_MARKS and bare else None


def _quoted_question(sentence: str) -> bool:
    return bool(regex.search(r"[\"“‘'].*[?？][\"”’']\W*$", sentence))
