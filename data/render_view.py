"""A training row for people: its tokens as text, the trained ones marked, for a terminal or a machine.

A token need not be a whole character (a Kannada letter takes several), and decoders add or drop blanks at the edges of
what they are given. So a piece is the shortest run of tokens that decodes to whole characters after the piece before
it, and it never crosses the border between trained and not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.data.render import IGNORED, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST = 16
"""Tokens that are tried as one character before what stands there is shown as it decodes."""
_BROKEN = "\ufffd"


class Piece(NamedTuple):
    """Tokens that make whole characters.

    Attributes:
        text: As decoded.
        ids: One or more token ids.
        start: Place of the first one in the row.
        trained: Whether the loss counts them.
        special: Whether it is a special token.
    """

    text: str
    ids: tuple[int, ...]
    start: int
    trained: bool
    special: bool


class Shown(NamedTuple):
    """A row in pieces.

    Attributes:
        pieces: In order; their texts joined are the row's.
        tokens: In the row.
        trained: Of these.
        dropped: Cut off at the end by the length limit.
    """

    pieces: list[Piece]
    tokens: int
    trained: int
    dropped: int

    @property
    def share(self) -> float:
        """Trained of all tokens."""
        return self.trained / self.tokens if self.tokens else 0.0


def show(row: Rendered, tokenizer: PreTrainedTokenizerBase) -> Shown:
    """Cut a row into pieces."""
    ids, trained = row.input_ids, [label != IGNORED for label in row.labels]
    special = {identity for identity, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    pieces: list[Piece] = []
    start = 0
    while start < len(ids):
        before = pieces[-1].ids if pieces else ()
        end = start + 1
        text = _decoded(tokenizer, before, ids[start:end])
        longest = min(len(ids), start + _LONGEST)
        while _BROKEN in text and end < longest and trained[end] == trained[start] and ids[end] not in special:
            end += 1
            text = _decoded(tokenizer, before, ids[start:end])
        pieces.append(Piece(text, tuple(ids[start:end]), start, trained[start], ids[start] in special))
        start = end
    return Shown(pieces, len(ids), sum(trained), row.dropped)


def _decoded(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """What the tokens add after the ones before them."""

    def text(of: Sequence[int]) -> str:
        return str(tokenizer.decode(list(of), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    lead = text(before) if before else ""
    whole = text([*before, *ids])
    return whole[len(lead) :] if whole.startswith(lead) else text(ids)


_GREEN, _DIM, _UNDER, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[4m", "\x1b[0m"


def as_text(shown: Shown, colours: bool) -> str:
    """The row for a terminal.

    Args:
        shown: The row.
        colours: Trained tokens in green, special ones dim, every other token underlined so that their borders show;
            without colours trained stretches stand between ⟦ and ⟧, and their tokens are parted by ¦.
    """
    return _coloured(shown) if colours else _bracketed(shown)


def _coloured(shown: Shown) -> str:
    parts = []
    for number, piece in enumerate(shown.pieces):
        style = (_GREEN if piece.trained else "") + (_DIM if piece.special else "") + (_UNDER if number % 2 else "")
        parts.append(f"{style}{_harmless(piece.text)}{_RESET}" if style else _harmless(piece.text))
    return "".join(parts)


def _bracketed(shown: Shown) -> str:
    parts, inside = [], False
    for piece in shown.pieces:
        if piece.trained:
            parts.append("¦" if inside else "⟦")
        elif inside:
            parts.append("⟧")
        inside = piece.trained
        parts.append(_harmless(piece.text))
    return "".join(parts) + ("⟧" if inside else "")


def _harmless(text: str) -> str:
    """Without characters that a terminal would obey; line breaks, tabs and the joiners of Indic scripts stay."""
    return "".join(c if c in "\n\t\u200c\u200d" or c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def as_json(shown: Shown) -> dict[str, Any]:
    """The row as JSON values."""
    return {
        "tokens": shown.tokens,
        "trained": shown.trained,
        "share": round(shown.share, 4),
        "dropped": shown.dropped,
        "pieces": [piece._asdict() for piece in shown.pieces],
    }
