"""`data generate`, `data audit`, `data render`."""

from __future__ import annotations

import typer

from qat.commands.audit import audit
from qat.commands.generate import generate
from qat.commands.render import render

app = typer.Typer(no_args_is_help=True, help="Conversations: make, audit, look at them as tokens.")
app.command("generate")(generate)
app.command("audit")(audit)
app.command("render")(render)
