"""Training rows as one self-contained HTML page: every token a cell, the trained ones marked, everything escaped."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from qat.data.render_view import Piece, Shown

_STYLE = Markup("""\
:root {
  --page: #f6f7f9; --card: #fff; --ink: #1c2430; --soft: #5d6b7e; --rule: #d9dfe7; --even: #eef1f5; --odd: #e2e7ee;
  --trained: #c9f0d6; --trained-odd: #aee5c1; --trained-ink: #0b4a29; --special: #8a4b12;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1b2129; --ink: #e4e9f0; --soft: #98a5b5; --rule: #2e3742; --even: #252c36;
    --odd: #2e3642; --trained: #134a2c; --trained-odd: #1a5f39; --trained-ink: #c9f5d9; --special: #f0b072;
  }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.25rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0 0 8px; }
p { margin: 4px 0 12px; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px; }
section + section { margin-top: 14px; }
.row { font: 13.5px/2 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
i { font-style: normal; border-radius: 3px; padding: 2px 0; }
.key i { padding: 2px 5px; margin-right: 12px; }
.e { background: var(--even); }
.o { background: var(--odd); }
.t { color: var(--trained-ink); }
.t.e { background: var(--trained); }
.t.o { background: var(--trained-odd); }
.s { color: var(--special); font-weight: 600; }
.soft, .n { color: var(--soft); }
@media print { :root { --page: #fff; } .t { text-decoration: underline; } }
""")
_PAGE = Markup("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="soft">{facts}</p>
<p class="key"><i class="t e">trained: in the loss</i><i class="e">context</i><i class="e s">special token</i></p>
{rows}
</main>
</body>
</html>
""")
_ROW = Markup('<section>\n<h2>{head}</h2>\n<div class="row">{tokens}</div>\n</section>')
_TOKEN = Markup('<i class="{kind}" title="{title}">{text}</i>')
# The break stands inside its token and also breaks the line, so that the page reads as the conversation does.
_BREAK = Markup('<span class="n">↵</span>\n')


def as_page(title: str, facts: Sequence[str], rows: Sequence[Shown]) -> str:
    """The rows of a conversation as HTML.

    Args:
        title: The conversation's id.
        facts: Shown below the title.
        rows: One, or one for each reply where the template rewrites earlier turns.
    """
    sections = []
    for number, row in enumerate(rows, start=1):
        head = f"{row.tokens} tokens, {row.trained} trained ({row.share:.1%})"
        if len(rows) > 1:
            head = f"Row {number} of {len(rows)}: {head}"
        if row.dropped:
            head += f"; {row.dropped} more are cut off by the length limit"
        tokens = Markup("").join(_token(place, piece) for place, piece in enumerate(row.pieces))
        sections.append(_ROW.format(head=head, tokens=tokens))
    page = _PAGE.format(title=title, style=_STYLE, facts=" · ".join(facts), rows=Markup("\n").join(sections))
    return str(page)


def _token(place: int, piece: Piece) -> Markup:
    kind = ("t " if piece.trained else "") + ("o" if place % 2 else "e") + (" s" if piece.special else "")
    last = piece.start + len(piece.ids) - 1
    where = f"token {last}" if last == piece.start else f"tokens {piece.start} to {last}"
    title = f"{where}, id {' '.join(map(str, piece.ids))}, {'trained' if piece.trained else 'not trained'}"
    return _TOKEN.format(kind=kind, title=title, text=_BREAK.join(piece.text.split("\n")))
