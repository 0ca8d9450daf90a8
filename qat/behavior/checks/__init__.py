"""Checks on replies, by name. Importing this package fills the table."""

from __future__ import annotations

from qat.behavior.checks import (
    content,
    fabrication,
    followup,
    judge,
    language,
    leaks,
    manners,
    names,
    refusal,
    roles,
    speech,
    thinking,
    timing,
    tools,
    user_code,
)
from qat.behavior.checks.base import BoundCheck, CheckError, CheckResult, Reply, ToolCall, bind, check_names

__all__ = [
    "BoundCheck",
    "CheckError",
    "CheckResult",
    "Reply",
    "ToolCall",
    "bind",
    "check_names",
    "content",
    "fabrication",
    "followup",
    "judge",
    "language",
    "leaks",
    "manners",
    "names",
    "refusal",
    "roles",
    "speech",
    "thinking",
    "timing",
    "tools",
    "user_code",
]
