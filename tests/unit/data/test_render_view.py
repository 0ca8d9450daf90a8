from __future__ import annotations

import random
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest

from qat.data.render import IGNORED, Rendered, render
from qat.data.render_page import as_page
from qat.data.render_view import Piece, Shown, as_json, as_text, show

TEXTS = (
    "Plain words, and more of them.\nA second line.",
    "ಕನ್ನಡದಲ್ಲಿ ನೀರು ಎಂದರೇನು?",
    "👩‍🚀 and 🇮🇳, naïve 数学",
    "<script>alert('x')</script> & \"quotes\"",
    "tab\there, zero width: a\u200db",
)


def _row(tokenizer: Any, user: str, reply: str) -> Rendered:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    return render({"id": "c", "category": "x", "messages": messages}, tokenizer)  # type: ignore[typeddict-item]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_row(nemotron_like: Any, text: str) -> None:
    """One token a byte: a letter of Kannada is three tokens, an emoji four, and each is shown whole."""
    row = _row(nemotron_like, "Say " + text, text)
    shown = show(row, nemotron_like)
    assert [identity for piece in shown.pieces for identity in piece.ids] == row.input_ids
    assert "".join(piece.text for piece in shown.pieces) == nemotron_like.decode(row.input_ids)
    for piece in shown.pieces:
        labels = row.labels[piece.start : piece.start + len(piece.ids)]
        assert [label != IGNORED for label in labels] == [piece.trained] * len(piece.ids)
        assert piece.special == (piece.text in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"))
        assert piece.special or (len(piece.text) == 1 and len(piece.text.encode()) == len(piece.ids))
    trained = "".join(piece.text for piece in shown.pieces if piece.trained)
    assert trained == text + "<|im_end|>"  # what the server makes the model write, its end included
    assert (shown.tokens, shown.trained) == (len(row.input_ids), sum(label != IGNORED for label in row.labels))


def test_bytes_that_are_no_character_stay_apart(nemotron_like: Any) -> None:
    """A row cut within a character, and a border between trained and not trained within one."""
    ids = nemotron_like.encode("ab ನೀ", add_special_tokens=False)
    for cut in range(1, len(ids)):
        labels = [IGNORED] * cut + ids[cut:]
        shown = show(Rendered(ids, labels), nemotron_like)
        assert [identity for piece in shown.pieces for identity in piece.ids] == ids
        assert sum(len(piece.ids) for piece in shown.pieces if piece.trained) == len(ids) - cut
        short = show(Rendered(ids[:cut], labels[:cut]), nemotron_like)
        assert sum(len(piece.ids) for piece in short.pieces) == cut


def test_words_keep_the_blanks_that_a_decoder_drops_at_the_edge() -> None:
    """A decoder of Llama's kind: the blank before a word belongs to its token and goes where the text begins."""
    words = ["▁Hello", "▁big", "ger", "▁world"]

    def decode(ids: list[int], **options: Any) -> str:
        return "".join(words[identity] for identity in ids).replace("▁", " ").removeprefix(" ")

    tokenizer: Any = SimpleNamespace(decode=decode, added_tokens_decoder={}, all_special_ids=[])
    shown = show(Rendered([0, 1, 2, 3], [IGNORED, 1, 2, 3]), tokenizer)
    assert [piece.text for piece in shown.pieces] == ["Hello", " big", "ger", " world"]


def _shown(*pieces: tuple[str, bool]) -> Shown:
    made = [Piece(text, (n,), n, trained, False) for n, (text, trained) in enumerate(pieces)]
    return Shown(made, len(made), sum(trained for _, trained in pieces), 0)


def test_in_a_terminal_what_is_trained_is_marked() -> None:
    shown = _shown(("<s>", False), ("hi ", False), ("yes ", True), ("it is", True), ("</s>", False), ("end", True))
    assert as_text(shown, colours=False) == "<s>hi ⟦yes ¦it is⟧</s>⟦end⟧"
    coloured = as_text(shown, colours=True)
    assert "\x1b[32myes \x1b[0m" in coloured and "\x1b[32m\x1b[4mit is\x1b[0m" in coloured
    assert "\x1b[32m<s>" not in coloured


def test_nothing_in_a_conversation_commands_the_terminal() -> None:
    hostile = _shown(("a\x1b[2Jb\x9b31m\rc\u202e\nd\u200de", False))
    assert as_text(hostile, colours=False) == "a\\u001b[2Jb\\u009b31m\\u000dc\\u202e\nd\u200de"


class _Tokens(HTMLParser):
    """The page as a browser reads it: the text of every token, and every element and attribute there is."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tokens: list[tuple[str, str, str]] = []
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self._in: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag in ("i", "span"):
            self._in.append(tag)
        if tag == "i":
            given = dict(attrs)
            self.tokens.append((given.get("class") or "", given.get("title") or "", ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("i", "span"):
            self._in.pop()

    def handle_data(self, data: str) -> None:
        if self._in == ["i"]:
            kind, title, text = self.tokens[-1]
            self.tokens[-1] = (kind, title, text + data)


def test_the_page_holds_the_row_and_escapes_everything(nemotron_like: Any) -> None:
    text = "\n".join(TEXTS)
    shown = show(_row(nemotron_like, text, text), nemotron_like)
    page = as_page("<b>id</b>", ["<img src=x>", "second"], [shown])
    read = _Tokens(page)
    cells = [cell for cell in read.tokens if cell[1]]
    assert [cell[2] for cell in cells] == [piece.text for piece in shown.pieces]
    assert ["t" in cell[0].split() for cell in cells] == [piece.trained for piece in shown.pieces]
    assert cells[0][1] == f"token 0, id {shown.pieces[0].ids[0]}, not trained"
    assert read.elements <= {*"html head meta title style body main h1 h2 p i section div span".split()}
    assert read.attributes <= {"lang", "charset", "name", "content", "class", "title"}  # loads nothing, runs nothing
    assert "&lt;b&gt;id&lt;/b&gt;" in page and "url(" not in page and "@import" not in page


def test_several_rows_and_what_is_cut_off_are_said() -> None:
    first = _shown(("a", False), ("b", True))
    second = first._replace(dropped=7)
    page = as_page("c", [], [first, second])
    assert "Row 1 of 2: 2 tokens, 1 trained (50.0%)" in page
    assert "Row 2 of 2: 2 tokens, 1 trained (50.0%); 7 more are cut off by the length limit" in page
    assert as_json(second)["dropped"] == 7 and as_json(second)["pieces"][1]["trained"] is True


def test_any_row_comes_back_whole(nemotron_like: Any) -> None:
    """Random bytes with random labels: nothing is lost, doubled or moved across the border."""
    rng = random.Random(5)
    for _ in range(60):
        ids = [rng.randrange(256) for _ in range(rng.randint(1, 60))]
        labels = [identity if rng.random() < 0.5 else IGNORED for identity in ids]
        shown = show(Rendered(ids, labels), nemotron_like)
        assert [identity for piece in shown.pieces for identity in piece.ids] == ids
        flags = [piece.trained for piece in shown.pieces for _ in piece.ids]
        assert flags == [label != IGNORED for label in labels]
