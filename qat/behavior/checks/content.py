"""Checks of what a reply says: words that must or must not occur."""

from __future__ import annotations

from typing import Self

from pydantic import ConfigDict, model_validator

from qat.behavior.checks.base import PASSED, CheckResult, Params, Reply, check, failed
from qat.behavior.checks.names import fold, fold_figures, mentions_phrase


class Mentions(Params):
    """Phrases of which at least one (`any`) and every one (`all`) must occur; a number is the text that it is."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    any: tuple[str, ...] = ()
    all: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _something(self) -> Self:
        phrases = [*self.any, *self.all]
        if not phrases:
            raise ValueError("give any or all")
        if empty := [phrase for phrase in phrases if not fold(phrase)]:
            raise ValueError(f"{empty[0]!r} has no letter or digit to look for")
        return self


@check("mentions", Mentions)
def mentions(reply: Reply, params: Mentions) -> CheckResult:
    """The last text holds the phrases, without regard to case, accents and punctuation, as whole words.

    A figure is one word ("1,500" is 1500 and not 500, "2.5" is not 5). Beyond Latin script an ending may follow
    ("ಮೈಸೂರಿ" is in "ಮೈಸೂರಿನಲ್ಲಿ", and also "кот" in "который"); in scripts without spaces any place will do.
    """
    text = fold_figures(reply.final)
    missing = [phrase for phrase in params.all if not mentions_phrase(text, phrase)]
    if missing:
        return failed(f"does not mention {missing[0]!r}")
    if params.any and not any(mentions_phrase(text, phrase) for phrase in params.any):
        return failed(f"mentions none of {', '.join(map(repr, params.any))}")
    return PASSED


class NotMentions(Params):
    """Phrases of which none may occur."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    any: tuple[str, ...]

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.any or not all(fold(phrase) for phrase in self.any):
            raise ValueError("give at least one phrase, each with a letter or digit")
        return self


@check("not_mentions", NotMentions)
def not_mentions(reply: Reply, params: NotMentions) -> CheckResult:
    """No text holds any of the phrases, which are found as `mentions` finds them."""
    for text in reply.texts:
        folded = fold_figures(text)
        for phrase in params.any:
            if mentions_phrase(folded, phrase):
                return failed(f"mentions {phrase!r}")
    return PASSED
