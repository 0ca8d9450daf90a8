"""What is wrong with a set of conversations before a single step is trained on it.

Faults make the set unfit: it would train another prompt than the served one, calls that no server accepts, or nothing.
Warnings are what usually costs a run: cut rows, few supervised tokens, repeated user turns, a lopsided mix, replies in
the manners that the behaviour suite forbids.
"""

from __future__ import annotations

import difflib
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qat.data.duplicates import near_pairs, normalise_turn, user_turns
from qat.data.load import to_line
from qat.data.render import IGNORED, render_rows
from qat.data.schema import Conversation, Persona, argument_faults
from qat.data.text import find_emoji, find_follow_up, find_markdown
from qat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_SUPERVISED_SHARE = 0.05
"""Supervised tokens of all tokens; a published run trained 4 % of its tokens (the prompt filled the rest)."""
LEAST_DISTINCT_SHARE = 0.95
"""Distinct user turns of all user turns."""
LEAST_CATEGORY_SHARE = 0.25
"""Of the even share (conversations / categories) that the smallest category should have."""

_EXAMPLES = 5
_SHOWN = 5
_LENGTH_BINS = 16


@dataclass
class AuditReport:
    """The findings; `faults` forbid training, `warnings` do not, `numbers` hold the rest (jsonable)."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The whole report as one jsonable mapping: `faults`, `warnings` and the keys of `numbers`."""
        return {"faults": self.faults, "warnings": self.warnings, **self.numbers}


def audit(
    conversations: Sequence[Conversation], persona: Persona, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> AuditReport:
    """Audit conversations against the persona that will be served.

    Args:
        conversations: As `load_conversations` returns them.
        persona: The persona: its prompt and tools must be those of every conversation, byte for byte.
        tokenizer: The base model's tokenizer with the chat template of training and serving.
        max_length: Longest training row, in tokens.

    Returns:
        The report. Long lists are cut to the first few, with their full count.
    """
    report = AuditReport(
        numbers={"conversations": len(conversations), "persona": persona.name, "max_length": max_length}
    )
    if not conversations:
        report.faults.append("there is no conversation")
        return report
    _audit_prompts(conversations, persona, report)
    _audit_tools(conversations, persona, report)
    _audit_calls(conversations, persona, report)
    _audit_rows(conversations, tokenizer, max_length, report)
    _audit_special_tokens(conversations, tokenizer, report)
    _audit_turns(conversations, report)
    _audit_categories(conversations, report)
    _audit_manners(conversations, report)
    return report


def _some(ids: Sequence[str]) -> str:
    """The first few ids and how many more there are."""
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(ids[:_SHOWN]) + more


def _audit_prompts(conversations: Sequence[Conversation], persona: Persona, report: AuditReport) -> None:
    variants: dict[str | None, list[str]] = {}
    for conversation in conversations:
        first = conversation["messages"][0]
        variants.setdefault(first["content"] if first["role"] == "system" else None, []).append(conversation["id"])
    others = {prompt: ids for prompt, ids in variants.items() if prompt != persona.system_prompt}
    for prompt, ids in others.items():
        if prompt is None:
            report.faults.append(
                f"no system prompt in {len(ids)} conversations ({_some(ids)}); the server sends {persona.name}'s"
            )
        else:
            report.faults.append(
                f"the system prompt differs from {persona.name}'s in {len(ids)} conversations ({_some(ids)}):\n"
                + prompt_diff(persona.system_prompt, prompt)
            )
    report.numbers["system_prompt"] = {
        "equal": len(variants.get(persona.system_prompt, ())),
        "different": sum(map(len, others.values())),
        "variants": len(variants),
    }


def prompt_diff(expected: str, found: str) -> str:
    """Unified diff of two prompts by lines; where lines only differ in white space, they are shown with `repr`."""
    before, after = expected.splitlines(), found.splitlines()
    if [" ".join(line.split()) for line in before] == [" ".join(line.split()) for line in after]:
        before, after = (
            [repr(line) for line in expected.splitlines(True)],
            [repr(line) for line in found.splitlines(True)],
        )
    return "\n".join(difflib.unified_diff(before, after, "persona", "data", lineterm="", n=1))


def _audit_tools(conversations: Sequence[Conversation], persona: Persona, report: AuditReport) -> None:
    expected = json.dumps(
        persona.tools, ensure_ascii=False
    )  # the order of keys and tools is part of the rendered prompt
    different: dict[str, list[str]] = {}
    for conversation in conversations:
        found = conversation.get("tools", [])
        if json.dumps(found, ensure_ascii=False) != expected:
            different.setdefault(_tool_difference(persona.tools, found), []).append(conversation["id"])
    for reason, ids in different.items():
        report.faults.append(
            f"the tools differ from {persona.name}'s in {len(ids)} conversations ({_some(ids)}): {reason}"
        )
    count = sum(map(len, different.values()))
    report.numbers["tools"] = {"equal": len(conversations) - count, "different": count}


def _tool_difference(expected: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> str:
    ours = {tool["function"]["name"]: tool for tool in expected}
    theirs = {tool["function"]["name"]: tool for tool in found}
    parts = [f"{word} {', '.join(names)}" for word, names in (
        ("missing", [name for name in ours if name not in theirs]),
        ("added", [name for name in theirs if name not in ours]),
        ("changed", [name for name in ours if name in theirs and ours[name] != theirs[name]]),
    ) if names]  # fmt: skip
    return "; ".join(parts) or "another order of tools or keys"


def _audit_calls(conversations: Sequence[Conversation], persona: Persona, report: AuditReport) -> None:
    called: Counter[str] = Counter()
    invalid = 0
    for conversation in conversations:
        for position, message in enumerate(conversation["messages"]):
            for call in message.get("tool_calls", ()):
                function = call["function"]
                called[function["name"]] += 1
                problems = argument_faults(function["name"], function["arguments"], persona.tools)
                invalid += bool(problems)
                report.faults += [f"{conversation['id']}: messages[{position}] {problem}" for problem in problems]
    unused = [tool["function"]["name"] for tool in persona.tools if tool["function"]["name"] not in called]
    if unused:
        report.warnings.append(f"never called in the data: {', '.join(unused)}")
    report.numbers["tool_calls"] = {
        "total": called.total(),
        "invalid": invalid,
        "by_tool": dict(called.most_common()),
        "unused": unused,
    }


def _audit_rows(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int, report: AuditReport
) -> None:
    lengths: list[int] = []
    supervised = tokens = 0
    cut: list[str] = []
    split: list[str] = []
    for conversation in conversations:
        try:
            rows = render_rows(conversation, tokenizer)
        except UserError as error:
            report.faults.append(f"{conversation['id']}: {error.what} {error.value or ''}".rstrip())
            continue
        if len(rows) > 1:
            split.append(conversation["id"])
        for row in rows:
            lengths.append(len(row.input_ids))
            kept = row.labels[:max_length]
            learnt = sum(label != IGNORED for label in kept)
            tokens, supervised = tokens + len(kept), supervised + learnt
            if len(row.input_ids) > max_length:
                cut.append(conversation["id"])
            if not learnt:
                report.faults.append(
                    f"{conversation['id']}: no supervised token within the first {max_length} of "
                    f"{len(row.input_ids)} tokens"
                )
    share = supervised / tokens if tokens else 0.0
    if cut:
        report.warnings.append(
            f"{len(cut)} of {len(lengths)} rows are longer than {max_length} tokens and are cut ({_some(cut)})"
        )
    if split:
        report.warnings.append(
            f"the chat template rewrites earlier turns of {len(split)} conversations ({_some(split)}): "
            "each becomes one row per reply"
        )
    if tokens and share < LEAST_SUPERVISED_SHARE:
        report.warnings.append(f"only {share:.1%} of the tokens are supervised ({supervised} of {tokens})")
    report.numbers["tokens"] = {
        "rows": len(lengths),
        "total": tokens,
        "supervised": supervised,
        "share": round(share, 4),
    }
    report.numbers["lengths"] = _length_numbers(lengths, len(cut))
    report.numbers["one_row_per_reply"] = len(split)


def _length_numbers(lengths: Sequence[int], truncated: int) -> dict[str, Any]:
    if not lengths:
        return {"truncated": 0, "histogram": []}
    ordered = sorted(lengths)
    width = max(1, -(-(ordered[-1] - ordered[0] + 1) // _LENGTH_BINS))
    counts = Counter((length - ordered[0]) // width for length in lengths)
    bins = [
        {"from": ordered[0] + place * width, "to": ordered[0] + (place + 1) * width - 1, "count": counts[place]}
        for place in range(max(counts) + 1)
    ]
    return {
        "min": ordered[0],
        "median": statistics.median(ordered),
        "p95": ordered[-(-95 * len(ordered) // 100) - 1],
        "max": ordered[-1],
        "truncated": truncated,
        "histogram": bins,
    }


def _audit_special_tokens(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, report: AuditReport
) -> None:
    # A control token written inside a message is tokenized as one, and moves where turns begin and end.
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(
        tokenizer.all_special_tokens
    )
    for conversation in conversations:
        for position, message in enumerate(conversation["messages"]):
            found = sorted(token for token in added if token in message["content"])
            if found:
                report.faults.append(
                    f"{conversation['id']}: messages[{position}] contains the special token {', '.join(found)}"
                )


def _audit_turns(conversations: Sequence[Conversation], report: AuditReport) -> None:
    turns = Counter(normalise_turn(turn) for conversation in conversations for turn in user_turns(conversation))
    distinct = list(turns)
    pairs = near_pairs(distinct)
    near = {position for pair in pairs for position in pair[:2]}
    share = len(distinct) / turns.total()
    whole = Counter(to_line({**conversation, "id": "", "category": ""}) for conversation in conversations)
    repeated = sum(count - 1 for count in whole.values())
    if repeated:
        report.warnings.append(f"{repeated} conversations repeat another one word for word")
    if share < LEAST_DISTINCT_SHARE:
        most = ", ".join(f"{turn!r} {count} times" for turn, count in turns.most_common(3))
        report.warnings.append(f"only {share:.1%} of the {turns.total()} user turns are distinct ({most})")
    report.numbers["user_turns"] = {
        "total": turns.total(),
        "distinct": len(distinct),
        "distinct_share": round(share, 4),
        "near_duplicate_turns": len(near),
        "near_duplicate_pairs": len(pairs),
        "near_examples": [[distinct[a], distinct[b], round(similarity, 3)] for a, b, similarity in pairs[:_EXAMPLES]],
        "repeated_conversations": repeated,
    }


def _audit_categories(conversations: Sequence[Conversation], report: AuditReport) -> None:
    counts = Counter(conversation["category"] for conversation in conversations)
    even = len(conversations) / len(counts)
    small = [f"{name} ({count})" for name, count in counts.items() if count < LEAST_CATEGORY_SHARE * even]
    if small:
        report.warnings.append(f"categories far below the even share of {even:.0f} conversations: {', '.join(small)}")
    report.numbers["categories"] = dict(sorted(counts.items()))


def _replies(conversations: Sequence[Conversation]) -> Iterator[tuple[str, str]]:
    for conversation in conversations:
        for message in conversation["messages"]:
            if message["role"] == "assistant" and message["content"]:
                yield conversation["id"], message["content"]


def _audit_manners(conversations: Sequence[Conversation], report: AuditReport) -> None:
    found: dict[str, list[tuple[str, str]]] = {"emoji": [], "markdown": [], "follow-up question": []}
    total = 0
    for identity, reply in _replies(conversations):
        total += 1
        if emoji := find_emoji(reply):
            found["emoji"].append((identity, " ".join(emoji)))
        if markdown := find_markdown(reply):
            found["markdown"].append((identity, ", ".join(markdown)))
        if question := find_follow_up(reply):
            found["follow-up question"].append((identity, question))
    for manner, places in found.items():
        if places:
            identity, example = places[0]
            report.warnings.append(
                f"{len(places)} of {total} replies teach a forbidden manner: {manner} (as in {identity}: {example!r})"
            )
    report.numbers["manners"] = {
        "replies": total,
        **{
            manner.replace("-", "_").replace(" ", "_"): {
                "count": len(places),
                "examples": [list(place) for place in places[:_EXAMPLES]],
            }
            for manner, places in found.items()
        },
    }
