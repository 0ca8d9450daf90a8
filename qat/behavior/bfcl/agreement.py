"""How often our BFCL and the package's agree: what is offered, how a reply is read, and whether its calls are right.

    pip download --no-deps bfcl-eval==2026.3.23 && unzip -d FOLDER bfcl_eval-*.whl
    python -m qat.behavior.bfcl.agreement --data FOLDER/bfcl_eval/data --reference FOLDER --out agreement.json

Every case is compared, with right and with systematically wrong answers.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qat.behavior.bfcl.literal_mutations import literal_mutations, random_literal
from qat.behavior.bfcl.literals import TYPES, WITH_ITEMS, Language, read_literal
from qat.behavior.bfcl.matching import Function, match, wire_name
from qat.behavior.bfcl.mutations import Calls, mutations
from qat.behavior.bfcl.reference import Judge, Reference, load_reference
from qat.behavior.bfcl.splits import SPLITS, described, offered
from qat.behavior.checks import Reply, bind

TEXTS = 100_000
"""Random texts of each language that both read."""

_ARGUMENTS = (None, "", "{}", "null", "[]", "[1]", '"text"', "7", '{"a": 1', "{'a': 1}", '{"a": 1} ')


def compare(data: Path, splits: Sequence[str], judge: Judge) -> dict[str, Any]:
    """Judge every mutation of every case twice.

    Returns:
        Per split the cases, answers, how often both pass, both fail, only one passes, and how often the reference
        raises; the same per mutation; the cases whose ground truth fails, with the reason and what passes instead; and
        every kind of disagreement with an example.
    """
    by_split: dict[str, Counter[str]] = {}
    by_mutation: dict[str, Counter[str]] = defaultdict(Counter)
    differing: dict[str, dict[str, Any]] = {}
    truth_failed: dict[str, str] = {}
    for split in splits:
        count = by_split.setdefault(split, Counter())
        kind, language = SPLITS[split]
        for entry, answers in _entries(data, split):
            count["cases"] += 1
            functions = [described(one, language) for one in entry["function"]]
            passing: dict[str, None] = {}
            faults: list[str] = []
            for label, calls in _tried(functions, answers):
                fault = match(kind, functions, answers, calls)
                outcome = _outcome(fault is None, judge, entry["function"], calls, answers, split)
                count[outcome] += 1
                by_mutation[label][outcome] += 1
                if outcome == "both pass":
                    passing[label] = None
                if label.startswith("ground truth") and fault is not None:
                    faults.append(fault)
                if not outcome.startswith("both"):
                    found = differing.setdefault(
                        f"{label}: {outcome}", {"times": 0, "case": entry["id"], "calls": calls}
                    )
                    found["times"] += 1
            if faults and not any(label.startswith("ground truth") for label in passing):
                truth_failed[entry["id"]] = (
                    f"{faults[0]} (both pass: {', '.join(sorted(passing)) or 'no answer tried'})"
                )
    return {
        "splits": {name: dict(count) for name, count in by_split.items()},
        "mutations": {name: dict(count) for name, count in sorted(by_mutation.items())},
        "ground_truth_failed": truth_failed,
        "differing": differing,
    }


def _tried(functions: Sequence[Function], answers: list[Any]) -> Iterator[tuple[str, Calls]]:
    if functions[0].language == "python":
        return mutations(answers, wire_name)
    return literal_mutations(functions[0], answers, wire_name)


def _outcome(ours: bool, theirs: Callable[..., bool], *question: object) -> str:
    try:
        passed = theirs(*question)
    except (TypeError, AttributeError, KeyError, ValueError, IndexError, OverflowError) as error:
        return f"we {'pass' if ours else 'fail'}, BFCL raises {type(error).__name__}"
    if ours != passed:
        return "only we pass" if ours else "only BFCL passes"
    return "both pass" if ours else "both fail"


def compare_replies(data: Path, splits: Sequence[str], reference: Reference) -> dict[str, Any]:
    """Judge messages as a server sends them: without calls, with right ones, and with arguments that are no object.

    Returns:
        Per split how often both pass, both fail and so on, and every kind of disagreement with an example.
    """
    by_split: dict[str, Counter[str]] = {}
    differing: dict[str, Any] = {}
    for split in splits:
        count = by_split.setdefault(split, Counter())
        kind, language = SPLITS[split]
        for entry, answers in _entries(data, split):
            functions = [described(one, language) for one in entry["function"]] if answers else []
            spec = {"kind": kind, "functions": [one.model_dump() for one in functions], "answers": answers}
            judged = bind("bfcl", spec)
            for message in _messages(entry, functions, answers):
                outcome = _outcome(judged(Reply([message])).passed, reference.reply, entry, answers, split, message)
                count[outcome] += 1
                if not outcome.startswith("both"):
                    differing.setdefault(f"{split}: {outcome}", {"case": entry["id"], "message": message})
    return {"splits": {name: dict(count) for name, count in by_split.items()}, "differing": differing}


def _messages(entry: Mapping[str, Any], functions: Sequence[Function], answers: list[Any]) -> Iterator[dict[str, Any]]:
    def calling(*calls: tuple[str, str | None]) -> dict[str, Any]:
        made = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
        return {"role": "assistant", "content": None, "tool_calls": made}

    yield {"role": "assistant", "content": "Which city do you mean?"}
    yield {"role": "assistant", "content": "[]"}
    yield {"role": "assistant", "content": None}
    yield calling()
    right = next(_tried(functions, answers))[1] if answers else []
    written = [(name, json.dumps(arguments)) for call in right for name, arguments in call.items()]
    name = wire_name(entry["function"][0]["name"]) if entry["function"] else "unknown"
    if written:
        yield calling(*written)
    for arguments in _ARGUMENTS:
        yield calling((name, arguments))
        yield calling(*written, (name, arguments))
        yield calling(*written[1:], (name, arguments))
    yield calling(("unknown", "{}"))


def compare_tools(data: Path, splits: Sequence[str], reference: Reference) -> dict[str, Any]:
    """Per split how many tools are offered, and the ids of the cases in which they differ from the package's."""
    found = {}
    for split in splits:
        differing, tools = [], 0
        for entry, _ in _entries(data, split):
            ours = [offered(one, SPLITS[split].language) for one in entry["function"]]
            tools += len(ours)
            if ours != reference.tools(entry):
                differing.append(entry["id"])
        found[split] = {"tools": tools, "differing": differing}
    return found


def compare_literals(reference: Reference, texts: int, seed: int = 0) -> dict[str, Any]:
    """Read random texts as literals of every type of Java and JavaScript.

    Returns:
        Per language how many texts, how many of them stand for something else than themselves, how often the package
        raises, and where the values differ.
    """
    found: dict[str, Any] = {}
    languages: tuple[Language, ...] = ("java", "javascript")
    for language in languages:
        rng = random.Random(seed)
        read, raised, differing = 0, 0, []
        for _ in range(texts):
            # Lists and mappings, whose literals can go wrong in more ways, come as often as all else.
            types = [name for name, kind in TYPES[language].items() if (kind in (list, dict)) == (rng.random() < 0.5)]
            declared = rng.choice(types or list(TYPES[language]))
            item = rng.choice(list(TYPES[language])) if declared in WITH_ITEMS else None
            text = random_literal(language, declared, rng)
            ours = read_literal(language, text, declared, item)
            try:
                theirs = reference.literal(language, text, declared, item)
            except ValueError:
                raised += 1
                continue
            read += ours != text
            if repr(ours) != repr(theirs):  # NaN is not equal to itself, and True is to 1
                differing.append({"type": [declared, item], "text": text, "ours": repr(ours), "theirs": repr(theirs)})
        found[language] = {"texts": texts, "values": read, "BFCL raises": raised, "differing": differing}
    return found


def _entries(data: Path, split: str) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """The cases of a split with their ground truth; an empty one where there is none."""
    truths: dict[str, list[Any]] = {}
    if SPLITS[split].answered:
        truths = {entry["id"]: entry["ground_truth"] for entry in _lines(data / "possible_answer", split)}
    for entry in _lines(data, split):
        yield entry, truths.get(entry["id"], [])


def _lines(folder: Path, split: str) -> list[dict[str, Any]]:
    text = (folder / f"BFCL_v4_{split}.json").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the agreement as JSON."""
    parser = argparse.ArgumentParser(description="Hold qat's BFCL against BFCL's own package.")
    parser.add_argument("--data", type=Path, required=True, help="folder with BFCL_v4_<split>.json")
    parser.add_argument("--reference", type=Path, required=True, help="folder with the package bfcl_eval")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    splits = [name for name in SPLITS if (given.data / f"BFCL_v4_{name}.json").is_file()]
    reference = load_reference(given.reference)
    result = {
        **compare(given.data, [name for name in splits if SPLITS[name].answered], reference.judge),
        "replies": compare_replies(given.data, splits, reference),
        "tools": compare_tools(given.data, splits, reference),
        "literals": compare_literals(reference, TEXTS),
    }
    given.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, count in result["splits"].items():
        print(name, count)


if __name__ == "__main__":
    main()
