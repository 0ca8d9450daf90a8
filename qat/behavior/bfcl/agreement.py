"""How often our matching and BFCL's own agree, case by case, on right and on systematically wrong answers.

    pip download --no-deps bfcl-eval==2026.3.23 && unzip -d FOLDER bfcl_eval-*.whl
    python -m qat.behavior.bfcl.agreement --data FOLDER/bfcl_eval/data --reference FOLDER --out agreement.json

The reference is the package's unchanged `ast_checker`. Only its table of models, whose import loads the clients of
every vendor, is replaced by one entry that says what the package says of OpenAI's: dots in names become underscores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from qat.behavior.bfcl.matching import match, wire_name
from qat.behavior.bfcl.mutations import Calls, mutations
from qat.behavior.bfcl.splits import SPLITS, described
from qat.errors import UserError

_MODEL = "qat"
Judge = Callable[[list[Any], Calls, list[Any], str], bool]


def reference_judge(folder: Path) -> Judge:
    """BFCL's `ast_checker` from an unpacked wheel: (functions, calls, answers, split) to whether it passes.

    Raises:
        UserError: The package is not in the folder.
    """
    if not (folder / "bfcl_eval" / "eval_checker" / "ast_eval" / "ast_checker.py").is_file():
        raise UserError("BFCL's package is not here.", where=str(folder), remedy="unpack the wheel of bfcl-eval there")
    sys.path.insert(0, str(folder))
    try:
        models = ModuleType("bfcl_eval.constants.model_config")
        models.MODEL_CONFIG_MAPPING = {_MODEL: SimpleNamespace(underscore_to_dot=True)}  # type: ignore[attr-defined]
        sys.modules[models.__name__] = models
        language = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON
        ast_checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker").ast_checker
    finally:
        sys.path.remove(str(folder))

    def judge(functions: list[Any], calls: Calls, answers: list[Any], split: str) -> bool:
        return bool(ast_checker(functions, calls, answers, language, split, _MODEL)["valid"])

    return judge


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
        truths = {entry["id"]: entry["ground_truth"] for entry in _lines(data / "possible_answer", split)}
        for entry in _lines(data, split):
            count["cases"] += 1
            functions, answers = [described(one) for one in entry["function"]], truths[entry["id"]]
            passing: list[str] = []
            for label, calls in mutations(answers, wire_name):
                fault = match(SPLITS[split], functions, answers, calls)
                outcome = _outcome(fault is None, judge, (entry["function"], calls, answers, split))
                count[outcome] += 1
                by_mutation[label][outcome] += 1
                if outcome == "both pass":
                    passing.append(label)
                if label == "ground truth" and fault is not None:
                    truth_failed[entry["id"]] = fault
                if outcome not in ("both pass", "both fail"):
                    found = differing.setdefault(
                        f"{label}: {outcome}", {"times": 0, "case": entry["id"], "calls": calls}
                    )
                    found["times"] += 1
            if entry["id"] in truth_failed:
                truth_failed[entry["id"]] += f" (both pass: {', '.join(sorted(set(passing))) or 'no answer tried'})"
    return {
        "splits": {name: dict(count) for name, count in by_split.items()},
        "mutations": {name: dict(count) for name, count in sorted(by_mutation.items())},
        "ground_truth_failed": truth_failed,
        "differing": differing,
    }


def _outcome(ours: bool, judge: Judge, question: tuple[list[Any], Calls, list[Any], str]) -> str:
    try:
        theirs = judge(*question)
    except (TypeError, AttributeError, KeyError, ValueError, IndexError) as error:
        return f"we {'pass' if ours else 'fail'}, BFCL raises {type(error).__name__}"
    if ours != theirs:
        return "only we pass" if ours else "only BFCL passes"
    return "both pass" if ours else "both fail"


def _lines(folder: Path, split: str) -> list[dict[str, Any]]:
    text = (folder / f"BFCL_v4_{split}.json").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table of agreement as JSON."""
    parser = argparse.ArgumentParser(description="Hold qat's BFCL matching against BFCL's own.")
    parser.add_argument("--data", type=Path, required=True, help="folder with BFCL_v4_<split>.json")
    parser.add_argument("--reference", type=Path, required=True, help="folder with the package bfcl_eval")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    splits = [
        name
        for name, kind in SPLITS.items()
        if kind not in ("irrelevance", "relevance") and (given.data / f"BFCL_v4_{name}.json").is_file()
    ]
    result = compare(given.data, splits, reference_judge(given.reference))
    given.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, count in result["splits"].items():
        print(name, count)


if __name__ == "__main__":
    main()
