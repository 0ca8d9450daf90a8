"""Checks on replies, by name. Importing this package fills the table."""

from __future__ import annotations

from qat.behavior.checks import content, fabrication, leaks, manners, names, tools
from qat.behavior.checks.base import BoundCheck, CheckResult, Reply, ToolCall, bind, check_names

__all__ = [
    "BoundCheck",
    "CheckResult",
    "Reply",
    "ToolCall",
    "bind",
    "check_names",
    "content",
    "fabrication",
    "leaks",
    "manners",
    "names",
    "tools",
]
