"""Write docs/chat_templates.md: what every chat template of a folder can do.

Run `python scripts/check_templates.py FOLDER`; the page of the repository is made from the folder that the tests read
(environment variable QAT_REAL_DATA), and a test holds that it is up to date.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.data.template_table import page, rows, templates_in

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "chat_templates.md"

HEAD = """# Real chat templates

*Written by `scripts/check_templates.py`; do not edit by hand.*

A tool call's `arguments` are a JSON string in OpenAI's form, in most data sets and in what a client sends. Chat
templates want a mapping: some iterate it and fail on a string, others dump it as JSON and so quote a string twice,
without any error. qat parses the strings when it reads conversations; vLLM does the same before it renders a prompt, so
that training and serving see one text. What a template cannot render even then is refused with a reason, in training
by `qat data audit`, for a checkpoint by `qat doctor`.

Two conversations were put through each template, with `enable_thinking=False`: system, user, reply; and system, user,
call, result, reply, with one tool offered. A rendering counts only if everything said, offered and called is in it.

| column | meaning |
|---|---|
| plain | renders the conversation without tools |
| mapping | renders the tool conversation with `arguments` as a mapping |
| string | the same with `arguments` as a JSON string, as it is; wrong: quoted twice, or otherwise not that text |
| normalised | the latter after qat has read it |
| marks | marks the replies with `{% generation %}`, which others build the assistant mask from; qat does not need it |
| empty think | the marks cover the `<think></think>` of the generation prompt, which the server writes, not the model |
| why not | what stands in the way of a tool conversation, or of a plain one |

Templates are programs of strangers. They were rendered in a child process: inside Jinja's immutable sandbox, with at
most 5 s of processor time and 512 MiB of memory, which the kernel enforces, and a million characters
(`data/templates.py`).

"""


def render(folder: Path) -> str:
    """The whole page.

    Args:
        folder: Holds the templates.
    """
    return HEAD + page(rows(templates_in(folder)))


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with *.jinja files and tokenizer_config.json files")
    parser.add_argument("--out", type=Path, default=TARGET, help="the page (default: docs/chat_templates.md)")
    arguments = parser.parse_args()
    arguments.out.write_text(render(arguments.folder), encoding="utf-8")


if __name__ == "__main__":
    main()
