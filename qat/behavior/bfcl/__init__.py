"""The Berkeley Function Calling Leaderboard (BFCL v4) as suites: its splits as cases, its matching as a check."""

from __future__ import annotations

from qat.behavior.bfcl.matching import Function, Kind, bfcl, match
from qat.behavior.bfcl.splits import GROUPS, SPLITS, load_bfcl

__all__ = ["GROUPS", "SPLITS", "Function", "Kind", "bfcl", "load_bfcl", "match"]
