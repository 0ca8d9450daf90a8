"""Checks of manners: how a reply is worded, whatever it says.

They judge every text that the model spoke, also one beside a tool call. The detectors that training data is audited
with (`qat.data.text`) are used here too and widened where a suite must be stricter than an audit.
"""

from __future__ import annotations

from functools import cache

import regex
from markdown_it import MarkdownIt
from markdown_it.token import Token

from qat.behavior.checks.base import PASSED, CheckResult, Params, Reply, check, failed
from qat.data.text import find_emoji, find_markdown

# Pictures of the plane U+1F000 that stand as text by default (thermometer, dove, chili) are drawn as emoji by every
# phone.
_PICTURES = regex.compile(r"[[\U0001F000-\U0001FAFF]&&\p{Extended_Pictographic}]", regex.VERSION1)


@check("no_emoji", Params)
def no_emoji(reply: Reply, params: Params) -> CheckResult:
    """No emoji in any text.

    Emoji are: characters of Emoji_Presentation, pictographs followed by U+FE0F, pictographs of U+2600..27BF and of
    plane U+1F000 (hearts, ticks, suns) also without it, flags, keycaps, skin tones and the sequences joined by U+200D
    made of these. Not emoji: (c), (R), TM, arrows, stars and bullets as text, digits, and U+200D inside Kannada or
    Devanagari, where it shapes a conjunct.
    """
    for text in reply.texts:
        found = find_emoji(text) or _PICTURES.findall(text)
        if found:
            points = " ".join(f"U+{ord(char):04X}" for char in found[0])
            return failed(f"emoji {found[0]} ({points}){_more(len(found))}")
    return PASSED


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


_MARKUP = regex.compile(r"[*_`#>|~\[\]<•◦‣▪●○■·=\\+–-]|\p{Nd}[.)]")
_PARSED = 10_000
"""Characters that the parser and the audit's patterns see: a text that is all brackets takes them quadratic time."""
_POWER = regex.compile(r"(?<=\d)\*\*(?=\d)")
_LEFTOVERS = {
    "leftover **": regex.compile(r"\*\*"),
    "leftover __": regex.compile(r"(?<!\w)__|__(?!\w)"),
    "leftover ```": regex.compile(r"```"),
    "leftover ~~": regex.compile(r"~~"),
    "leftover ##": regex.compile(r"^\s{0,3}#{2,6}(?!#)\s*\S", regex.MULTILINE),
    "bullet mark": regex.compile(r"^\s*[•◦‣▪●○■·]\s*\S", regex.MULTILINE),
    # No list to CommonMark, which wants a space and a hyphen; one to everybody who reads them below one another.
    "bullet list": regex.compile(r"^(?:[-*]\p{L}|[–+]\s\S)[^\n]*\n+(?:[-*]\p{L}|[–+]\s\S)", regex.MULTILINE),
    "numbered list": regex.compile(r"^\s*\p{Nd}{1,2}[.)]\s+\S[^\n]*\n+\s*\p{Nd}{1,2}[.)]\s+\S", regex.MULTILINE),
}
_TOKENS = {
    "heading_open": "heading",
    "bullet_list_open": "bullet list",
    "fence": "code fence",
    "code_block": "indented code",
    "blockquote_open": "block quote",
    "hr": "rule",
    "table_open": "table",
    "strong_open": "bold",
    "em_open": "italic",
    "s_open": "strikethrough",
    "code_inline": "inline code",
    "link_open": "link",
    "image": "image",
}
_FORMATTING_TAG = regex.compile(
    r"</?(?:b|i|u|br|hr|p|ul|ol|li|em|strong|code|pre|table|h[1-6]|span|div|a)\b", regex.IGNORECASE
)


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"])


@check("no_markdown", Params)
def no_markdown(reply: Reply, params: Params) -> CheckResult:
    """No markdown in any text: by the CommonMark parser (with tables and strikethrough), plus marks it could not pair.

    Arithmetic ("5 * 3", "2**3"), snake_case, a hash tag and a sentence that begins with a year ("2024. That was …")
    are no markdown.
    """
    for text in reply.texts:
        if _MARKUP.search(text) and (found := _markdown(_POWER.sub("^", text.strip()))):
            return failed(found)
    return PASSED


def _markdown(text: str) -> str | None:
    for name, pattern in _LEFTOVERS.items():
        if pattern.search(text):
            return name
    tokens = _parser().parse(text[:_PARSED])
    for position, token in enumerate(tokens):
        if token.type == "ordered_list_open" and _is_list(tokens, position):
            return "numbered list"
        for part in (token, *(token.children or ())):
            if part.type in _TOKENS and part.info != "auto":
                return _TOKENS[part.type]
            if part.type in ("html_inline", "html_block") and _FORMATTING_TAG.match(part.content):
                return "html"
    rest = find_markdown(text[:_PARSED])
    return rest[0] if rest else None


def _is_list(tokens: list[Token], position: int) -> bool:
    """An item that starts at 1, or several; one item that starts elsewhere is a sentence that begins with a number."""
    if (tokens[position].attrs or {}).get("start", 1) == 1:
        return True
    depth, items = tokens[position].level, 0
    for token in tokens[position + 1 :]:
        if token.type == "ordered_list_close" and token.level == depth:
            break
        items += token.type == "list_item_open"
    return items > 1


_SAID = regex.compile(r"[\p{L}\p{N}]")


@check("not_empty", Params)
def not_empty(reply: Reply, params: Params) -> CheckResult:
    """The last message holds a letter or a digit, or calls a tool."""
    if _SAID.search(reply.final):
        return PASSED
    if reply.produced and reply.produced[-1].get("tool_calls"):
        return PASSED
    return failed("the reply is empty" if not reply.final else f"no word in the reply: {reply.final}")


_CUT = {"length": "cut at the token limit", "repetition": "cut by the server, which saw it repeat itself"}
"""By `finish_reason`; vLLM gives the second one where its detection of repetition is on."""


@check("finished", Params)
def finished(reply: Reply, params: Params) -> CheckResult:
    """The model ended its turn itself; it was not cut at the token limit (what endless repetition comes to).

    Nor by a server that looks for repetition. What the text looks like is not asked.
    """
    reasons = (str(message.get("finish_reason")) for message in reply.produced)
    return next((failed(_CUT[reason]) for reason in reasons if reason in _CUT), PASSED)
