"""Checks of the chat template: there, the base's, safe, able to render tools, and ending turns where servers stop."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator

from qat.data.templates import check_template, render_template
from qat.errors import UserError
from qat.export.doctor.checks_tokenizer import SETTINGS, TOKENIZER, Vocabulary, read_vocabulary, stop_ids, token_text
from qat.export.doctor.findings import Finding, Severity
from qat.export.doctor.folder import CHAT_TEMPLATE, CheckpointView, is_adapter

_COPY = "Copy the base's template, unless the persona was trained with this one."
#: How `check_template` begins where the template had to be stopped.
_STOPPED = ("does not end", "writes without end", "crashes its process", "cannot be compiled")
#: A diff of two long texts takes time quadratic in their lines.
_MAX_DIFF_LINES = 2_000


def check_chat_template(view: CheckpointView, base: CheckpointView | None) -> Iterator[Finding]:
    """Check a checkpoint's chat template; it is rendered in a process of its own, never here.

    Args:
        view: The checkpoint.
        base: The checkpoint that it was made from.

    Yields:
        Findings; none for an adapter.
    """
    if is_adapter(view):
        return
    template, theirs = template_of(view), template_of(base) if base is not None else None
    if template is None:
        if theirs is not None:
            yield Finding(
                "template_missing",
                Severity.ERROR,
                CHAT_TEMPLATE,
                "The base has a chat template, the checkpoint has none",
                "The server refuses chat requests, or lays out prompts otherwise than in training.",
                _COPY,
            )
        return
    embedded = _embedded(view)
    if view.chat_template is not None and embedded is not None and not _equal(view.chat_template, embedded):
        yield Finding(
            "template_twice",
            Severity.WARNING,
            f"{CHAT_TEMPLATE} / {SETTINGS}",
            f"Two different templates: {_digest(view.chat_template)} and {_digest(embedded)}",
            f"Transformers since 4.51 goes by {CHAT_TEMPLATE}, older servers by {SETTINGS}: prompts differ.",
            f"Remove the one in {SETTINGS}.",
        )
    if theirs is not None and not _equal(template, theirs):
        problem = f"{_digest(template)}, the base's is {_digest(theirs)}: {_diff(theirs, template)}"
        consequence = "Prompts are laid out otherwise than in the base's training, and tools may be offered otherwise."
        yield Finding("template_differs", Severity.WARNING, CHAT_TEMPLATE, problem, consequence, _COPY)
    problems = check_template(template)
    yield from (_problem(problem) for problem in problems)
    if not problems or problems[0].startswith("tools: "):
        yield from _turn_end(view, template)


def template_of(view: CheckpointView) -> str | None:
    """The template that Transformers takes: `chat_template.jinja`, else the one in the tokenizer's settings."""
    return view.chat_template if view.chat_template is not None else _embedded(view)


def _embedded(view: CheckpointView) -> str | None:
    found = (view.tokenizer_config or {}).get("chat_template")
    if isinstance(found, list):  # several by name
        entries = [entry for entry in found if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
        named = {entry["name"]: entry.get("template") for entry in entries}
        found = named.get("default", next(iter(named.values()), None))
    return found if isinstance(found, str) else None


def _problem(problem: str) -> Finding:
    if problem.startswith(_STOPPED) or "SecurityError" in problem:
        consequence = "Whoever renders it lends it processor, memory or more: it is an attack, or broken."
        remedy = "Do not serve this checkpoint with its own template."
        return Finding("template_unsafe", Severity.ERROR, CHAT_TEMPLATE, problem, consequence, remedy)
    if problem.startswith("tools: "):
        # A model that was never taught tools has a template without them.
        plain = "leaves out the tools" in problem
        severity = Severity.NOTE if plain else Severity.WARNING
        consequence = "Requests with tools fail, or the model never sees what it may call."
        return Finding("template_tools", severity, CHAT_TEMPLATE, problem.removeprefix("tools: "), consequence, _COPY)
    if problem.startswith("a plain conversation: "):
        consequence = "Requests with a system prompt fail, or the model does not see all that was said."
        return Finding("template_plain", Severity.WARNING, CHAT_TEMPLATE, problem, consequence, _COPY)
    consequence = "The server refuses every chat request."
    return Finding("template_invalid", Severity.ERROR, CHAT_TEMPLATE, problem, consequence, _COPY)


_QUESTION, _ANSWER = "Is the shop open?", "Until seven."


def _turn_end(view: CheckpointView, template: str) -> Iterator[Finding]:
    """Hold the special token that the template puts behind an answer against the tokens that servers stop at."""
    vocabulary = read_vocabulary(view.read_json(TOKENIZER))
    if vocabulary is None:
        return
    end = _token_behind_answer(view, template, vocabulary)
    stops = stop_ids(view, vocabulary)
    if end is not None and vocabulary.ids[end] not in stops:
        yield Finding(
            "template_turn_end",
            Severity.ERROR,
            "generation_config.json: eos_token_id",
            f"The template ends turns with {end!r} ({vocabulary.ids[end]}), servers stop at "
            f"{', '.join(map(str, sorted(stops))) or 'no token'}",
            "Answers do not end: the model goes on with turns of its own until the token limit.",
            f"Add {vocabulary.ids[end]} to eos_token_id of generation_config.json.",
        )


def _token_behind_answer(view: CheckpointView, template: str, vocabulary: Vocabulary) -> str | None:
    settings = view.tokenizer_config or {}
    tokens = {key: token_text(settings.get(key)) or "" for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        [rendering] = render_template(template, [{**tokens, "messages": turns, "tools": None}])
    except UserError:
        return None
    rest = rendering.text.rpartition(_ANSWER)[2].lstrip()
    ends = [token for token in vocabulary.special if token and rest.startswith(token)]
    return max(ends, key=len, default=None)


def _equal(one: str, other: str) -> bool:
    """Jinja drops one newline at the end."""
    return one.removesuffix("\n") == other.removesuffix("\n")


def _digest(text: str) -> str:
    return f"sha256 {hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def _diff(old: str, new: str) -> str:
    before, after = old.splitlines(), new.splitlines()
    if max(len(before), len(after)) > _MAX_DIFF_LINES:
        return f"{len(before)} and {len(after)} lines"
    lines = [line for line in list(difflib.unified_diff(before, after, n=0))[2:] if line[0] in "+-"]
    counts = {sign: sum(line[0] == sign for line in lines) for sign in "+-"}
    return f"{counts['+']} lines more, {counts['-']} less; first {lines[0].strip()!r}" if lines else "line endings"
