"""From counts to a report: which findings there are, how bad they are, and the numbers beside them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from qat.data.audit.examine import Settings
from qat.data.audit.findings import SHOWN, AuditReport, Example, Finding, Group, Place, Show
from qat.data.audit.repetition import repetition_findings, repetition_numbers
from qat.data.audit.replies import Demands
from qat.data.audit.tally import Tally, unpack
from qat.data.audit.texts import Kinds, repeats

LEAST_SUPERVISED_SHARE = 0.05
"""Supervised tokens of all tokens; a published run trained 4 % of its tokens (the prompt filled the rest)."""
LEAST_CATEGORY_SHARE = 0.25
"""Of the even share (conversations / categories) that the smallest category should have."""

FAULTS = (
    "empty", "schema", "id", "system_prompt", "tools", "arguments", "special_token", "template", "untrained", "leak",
)  # fmt: skip
"""Codes of the faults that are not a suite's check; any of them, or a check by name, can be accepted."""

_LENGTH_BINS = 16
_ROWS = "rows:"


def summarise(tally: Tally, texts: Kinds | None, settings: Settings, show: Show) -> AuditReport:
    """Make the report.

    Args:
        tally: Counts of the whole set.
        texts: What repeats in the set; None where that was not looked for.
        settings: What was looked at.
        show: Says a place in words.
    """
    findings = [*_faults(tally, settings, show), *_warnings(tally, texts, settings, show)]
    severity = {"fault": 0, "accepted": 1, "warning": 2}
    findings.sort(key=lambda finding: (severity[finding.severity], -finding.count))
    return AuditReport(findings, _numbers(tally, texts, settings))


def _examples(group: Group, show: Show) -> tuple[tuple[str, str], ...]:
    return tuple((show(example.place), example.detail) for example in group.examples)


def _faults(tally: Tally, settings: Settings, show: Show) -> Iterator[Finding]:
    if not tally.places:
        yield Finding("empty", "fault", 1, "there is no conversation")
    for (code, subject), group in (*tally.groups.items(), *_id_groups(tally, show)):
        if subject == "reply":
            message = f"{group.count} of {tally.numbers['replies']} replies fail the suite's check {code}"
        elif code in FAULTS:
            message = _fault(code, group, settings)
        else:
            continue
        accepted = code in settings.accept
        yield Finding(code, "accepted" if accepted else "fault", group.count, message, _examples(group, show))


def _fault(code: str, group: Group, settings: Settings) -> str:
    many, name = group.conversations, settings.persona.name
    about = f":\n{group.about}" if "\n" in group.about else f": {group.about}" if group.about else ""
    messages: Mapping[str, str] = {
        "schema": f"{many} records are no sound conversations ({group.count} faults)",
        "id": f"{group.count} conversations have the id of another one",
        "system_prompt": f"the system prompt differs from {name}'s, which is served, in {many} conversations{about}",
        "tools": f"the tools differ from {name}'s in {many} conversations{about}",
        "arguments": f"{group.count} times a tool call does not fit the tool",
        "special_token": f"{group.count} messages contain special tokens",
        "template": f"the chat template cannot render {many} conversations as they are",
        "untrained": f"{group.count} rows have no supervised token within {settings.max_length} tokens",
        "leak": f"{group.count} user turns are questions of the suite: it would measure memory",
    }
    return messages[code]


def _id_groups(tally: Tally, show: Show) -> list[tuple[tuple[str, str], Group]]:
    group = Group()
    for later, first in repeats(tally.ids):
        group.count += 1
        if len(group.examples) < SHOWN:
            origin = show(Place(*unpack(tally.places[first]), ""))
            group.examples.append(Example(Place(*unpack(tally.places[later]), ""), f"as {origin}"))
    return [(("id", ""), group)] if group.count else []


def _warnings(tally: Tally, texts: Kinds | None, settings: Settings, show: Show) -> Iterator[Finding]:
    rows, limit = _row_sums(tally), settings.max_length
    messages = {
        "near_leak": "{n} user turns are nearly questions of the suite",
        "reference_leak": "{n} replies are equal or nearly equal to a reference answer of the suite",
        "truncated": f"{rows['cut_rows']} of {rows['rows']} rows are longer than {limit} tokens and are cut: "
        f"{rows['cut_turns']} assistant turns lose their end, {rows['lost_turns']} are lost",
        "history": "the chat template rewrites earlier turns of {n} conversations: each becomes one row per reply",
    }
    for code, message in messages.items():
        if group := tally.groups.get((code, "")):
            yield Finding(code, "warning", group.count, message.format(n=group.count), _examples(group, show))
    share = rows["supervised"] / rows["tokens"] if rows["tokens"] else 1.0
    if share < LEAST_SUPERVISED_SHARE:
        message = f"only {share:.1%} of the tokens are supervised ({rows['supervised']} of {rows['tokens']})"
        yield Finding("few_supervised", "warning", 1, message)
    yield from repetition_findings(tally, texts, show)
    yield from _lopsided(tally, settings)
    if unread := tally.tables["unread"]:
        yield Finding("unread", "warning", len(unread), f"keys that are not read: {', '.join(sorted(unread))}")


def _lopsided(tally: Tally, settings: Settings) -> Iterator[Finding]:
    called = tally.tables["tools"]
    unused = [tool["function"]["name"] for tool in settings.persona.tools if tool["function"]["name"] not in called]
    if unused and tally.places:
        yield Finding("unused_tool", "warning", len(unused), f"never called in the data: {', '.join(unused)}")
    counts = tally.tables["categories"]
    even = len(tally.places) / max(len(counts), 1)
    small = [f"{name} ({count})" for name, count in counts.items() if count < LEAST_CATEGORY_SHARE * even]
    if small:
        message = f"categories far below the even share of {even:.0f} conversations: {', '.join(small)}"
        yield Finding("small_category", "warning", len(small), message)


def _row_sums(tally: Tally) -> Counter[str]:
    sums: Counter[str] = Counter()
    for name, table in tally.tables.items():
        if name.startswith(_ROWS):
            sums.update(table)
    return sums


def _numbers(tally: Tally, texts: Kinds | None, settings: Settings) -> dict[str, Any]:
    conversations = len(tally.places)
    called = tally.tables["tools"]
    prompts = [group for (code, _), group in tally.groups.items() if code == "system_prompt"]
    equal = {"prompt": tally.numbers["prompt_equal"], "tools": tally.numbers["tools_equal"]}
    numbers: dict[str, Any] = {
        "conversations": conversations,
        "persona": settings.persona.name,
        "max_length": settings.max_length,
        "system_prompt": {
            "equal": equal["prompt"],
            "different": conversations - equal["prompt"],
            "variants": len(prompts) + bool(equal["prompt"]),
        },
        "tools": {"equal": equal["tools"], "different": conversations - equal["tools"]},
        "tool_calls": {
            "total": called.total(),
            "invalid": tally.numbers["calls_invalid"],
            "by_tool": dict(called.most_common()),
        },
        "categories": dict(sorted(tally.tables["categories"].items())),
    }
    if "records" in tally.numbers:
        numbers["records"] = {"read": tally.numbers["records"], "unsound": tally.numbers["unsound"]}
    if settings.tokenizer is not None:
        numbers |= _token_numbers(tally)
    if settings.demands is not None:
        numbers["replies"] = _reply_numbers(tally, settings.demands)
    if texts is not None:
        numbers |= repetition_numbers(tally, texts)
    return numbers


def _reply_numbers(tally: Tally, demands: Demands) -> dict[str, Any]:
    failing = {code: group.count for (code, subject), group in tally.groups.items() if subject == "reply"}
    return {
        "suites": list(demands.suites),
        "checks": [" ".join(part for part in check if part != "{}") for check in demands.checks],
        "left_out": list(demands.left_out),
        "total": tally.numbers["replies"],
        "failing": tally.numbers["replies_failing"],
        "by_check": dict(sorted(failing.items(), key=lambda item: -item[1])),
        "words": spread(tally.histograms["reply_words"]),
        "languages": dict(tally.tables["reply_languages"].most_common()),
        "user_languages": dict(tally.tables["user_languages"].most_common()),
    }


def _token_numbers(tally: Tally) -> dict[str, Any]:
    rows = _row_sums(tally)
    names = ("tokens", "supervised", "rows", "cut_rows", "cut_turns", "lost_turns")
    share = tally.histograms["supervised_percent"]
    return {
        "tokens": {
            "rows": rows["rows"],
            "total": rows["tokens"],
            "supervised": rows["supervised"],
            "share": _share(rows),
            "percent_a_conversation": spread(share),
            "cut_turns": rows["cut_turns"],
            "lost_turns": rows["lost_turns"],
            "by_category": {
                name.removeprefix(_ROWS): {key: table[key] for key in names} | {"share": _share(table)}
                for name, table in sorted(tally.tables.items())
                if name.startswith(_ROWS)
            },
        },
        "lengths": {**spread(tally.histograms["lengths"]), "truncated": rows["cut_rows"],
                    "histogram": bins(tally.histograms["lengths"])},
        "one_row_per_reply": tally.groups[("history", "")].count if ("history", "") in tally.groups else 0,
    }  # fmt: skip


def _share(table: Mapping[str, int]) -> float:
    return round(table["supervised"] / table["tokens"], 4) if table["tokens"] else 0.0


def spread(histogram: Mapping[int, int]) -> dict[str, float]:
    """Least, median, 95th percentile (nearest rank) and greatest of counted whole numbers; empty where there are none.

    Args:
        histogram: How often each number came.
    """
    if not histogram:
        return {}
    total, seen = sum(histogram.values()), 0
    ordered = sorted(histogram)
    ranks = {"low": (total - 1) // 2, "high": total // 2, "p95": -(-95 * total // 100) - 1}
    at: dict[str, int] = {}
    for value in ordered:
        seen += histogram[value]
        for name, rank in ranks.items():
            if seen > rank:
                at.setdefault(name, value)
    return {"min": ordered[0], "median": statistics.mean((at["low"], at["high"])), "p95": at["p95"], "max": ordered[-1]}


def bins(histogram: Mapping[int, int]) -> list[dict[str, int]]:
    """At most 16 bins of equal width over counted whole numbers."""
    if not histogram:
        return []
    least, greatest = min(histogram), max(histogram)
    width = max(1, -(-(greatest - least + 1) // _LENGTH_BINS))
    counts: Counter[int] = Counter()
    for value, count in histogram.items():
        counts[(value - least) // width] += count
    return [
        {"from": least + place * width, "to": least + (place + 1) * width - 1, "count": counts[place]}
        for place in range(max(counts) + 1)
    ]
