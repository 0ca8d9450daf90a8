"""The audit of a data set as a page of its own: the same section that the report of a run holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.report.page import environment, length_chart
from qat.storage import write_atomic


def audit_page(name: str, audit: Mapping[str, Any]) -> str:
    """The HTML text of an audit; everything from the data is escaped.

    Args:
        name: Of the data set.
        audit: As `AuditReport.to_json` gives it.
    """
    template = environment().get_template("audit_page.html.j2")
    return template.render(name=name, audit=audit, lengths=length_chart(audit))


def write_audit_page(path: Path, name: str, audit: Mapping[str, Any]) -> None:
    """Write the page of an audit.

    Raises:
        UserError: The file cannot be written.
    """
    write_atomic(path, audit_page(name, audit))
