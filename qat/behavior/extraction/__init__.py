"""Extraction: JSON from text, scored by field."""

from __future__ import annotations

from qat.behavior.extraction.domains import DOMAINS
from qat.behavior.extraction.scoring import Field, FieldScores, Rule, Score, extraction, read_reply, score, scores_of
from qat.behavior.extraction.suite import extraction_suite

__all__ = [
    "DOMAINS",
    "Field",
    "FieldScores",
    "Rule",
    "Score",
    "extraction",
    "extraction_suite",
    "read_reply",
    "score",
    "scores_of",
]
