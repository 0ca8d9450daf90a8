"""Conversations, cases and pretraining text from grammars of the project's own; deterministic by seed."""

from qat.data.generate.conversations import CATEGORIES, cases, conversations

__all__ = ["CATEGORIES", "cases", "conversations"]
