"""Ours against BFCL's package, where QAT_BFCL_EVAL names its unpacked wheel; and how the two are compared."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from qat.behavior.bfcl import Function
from qat.behavior.bfcl.agreement import compare, compare_literals, compare_replies, compare_tools
from qat.behavior.bfcl.literal_mutations import literal_mutations, random_literal
from qat.behavior.bfcl.literals import read_literal
from qat.behavior.bfcl.mutations import Calls
from qat.behavior.bfcl.reference import Reference, load_reference
from qat.errors import UserError


@pytest.fixture(scope="module")
def reference() -> Reference:
    named = os.environ.get("QAT_BFCL_EVAL")
    if named is None:
        pytest.skip("no unpacked wheel of bfcl-eval (set QAT_BFCL_EVAL)")
    return load_reference(Path(named))


@pytest.mark.slow
def test_calls_are_judged_alike(real_data: Path, reference: Reference) -> None:
    splits = ["simple_python", "simple_java", "simple_javascript", "parallel_multiple"]
    result = compare(real_data / "bfcl_v4", splits, reference.judge)
    assert result["differing"] == {}
    assert sum(count["both pass"] for count in result["splits"].values()) > 50_000


@pytest.mark.slow
def test_replies_tools_and_literals_are_alike(real_data: Path, reference: Reference) -> None:
    data, splits = real_data / "bfcl_v4", ["simple_java", "multiple", "irrelevance", "live_relevance"]
    replies = compare_replies(data, splits, reference)
    assert replies["differing"] == {} and replies["splits"]["live_relevance"]["both pass"] > 16
    assert all(found["differing"] == [] for found in compare_tools(data, splits, reference).values())
    for found in compare_literals(reference, 10_000).values():
        assert found["differing"] == [] and found["values"] > 1_000


def test_a_folder_without_the_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not here"):
        load_reference(tmp_path)


def write(folder: Path, split: str, entry: dict[str, Any], truth: list[Any] | None) -> None:
    (folder / "possible_answer").mkdir(exist_ok=True)
    for target, content in ((folder, entry), (folder / "possible_answer", {"id": entry["id"], "ground_truth": truth})):
        if target == folder or truth is not None:
            (target / f"BFCL_v4_{split}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


FUNCTION = {
    "name": "f",
    "description": "F.",
    "parameters": {"type": "dict", "properties": {"a": {"type": "integer", "description": ""}}, "required": ["a"]},
}


def test_a_disagreement_is_counted_and_shown(tmp_path: Path) -> None:
    write(tmp_path, "simple_python", {"id": "x", "function": [FUNCTION]}, [{"f": {"a": [1]}}])

    def deaf(functions: list[Any], calls: Calls, answers: list[Any], split: str) -> bool:
        return calls[0]["f"] == {"b": 1}  # raises where there is no call

    result = compare(tmp_path, ["simple_python"], deaf)
    assert result["differing"]["ground truth: only we pass"]["times"] == 1
    assert result["differing"]["no call: we fail, BFCL raises IndexError"]["calls"] == []
    assert result["mutations"]["wrong number"] == {"both fail": 1} and result["ground_truth_failed"] == {}


def test_what_differs_in_replies_tools_and_literals_is_counted(tmp_path: Path) -> None:
    write(tmp_path, "simple_java", {"id": "x", "function": [FUNCTION]}, [{"f": {"a": [1]}}])
    write(tmp_path, "irrelevance", {"id": "y", "function": [FUNCTION]}, None)
    splits = ["simple_java", "irrelevance"]
    never = Reference(lambda *_: False, lambda *_: False, lambda _: [], lambda language, text, declared, item: text)
    replies = compare_replies(tmp_path, splits, never)
    assert replies["splits"]["simple_java"]["only we pass"] == 1  # the ground truth, once
    # Silence in four ways, and one call with nine texts that are no object; more than that is a call.
    assert replies["splits"]["irrelevance"]["only we pass"] > 4
    assert compare_tools(tmp_path, splits, never)["irrelevance"] == {"tools": 1, "differing": ["y"]}
    literals = compare_literals(never, 200)
    assert all(0 < found["values"] <= len(found["differing"]) + 1 for found in literals.values())


def test_the_ground_truth_is_written_in_every_style_and_changed() -> None:
    function = Function(
        name="f", types={"ids": ("ArrayList", "long"), "meta": ("HashMap", None)}, required=["ids"], language="java"
    )
    answers = [{"f": {"ids": [[1, 2]], "meta": [{"k": ["v"]}, ""]}}]
    tried = list(literal_mutations(function, answers, lambda name: name))
    texts = [calls[0]["f"] for label, calls in tried if label.startswith("ground truth")]
    assert texts == [
        {
            "ids": "new ArrayList<>(Arrays.asList(1L, 2L))",
            "meta": 'new HashMap<String, Object>() {{ put("k", "v"); }}',
        },
        {"ids": "new ArrayList<>(Arrays.asList(1L, 2L))", "meta": 'new HashMap<>() {{ put("k", "v"); }}'},
        {
            "ids": "new ArrayList<>() {{ add(1L); add(2L); }}",
            "meta": 'new HashMap<String, Object>() {{ put("k", "v"); }}',
        },
        {"ids": [1, 2], "meta": {"k": "v"}},
    ]
    assert ("list reversed, written", "new ArrayList<>(Arrays.asList(2L, 1L))") in [
        (label, calls[0]["f"].get("ids")) for label, calls in tried if calls and "f" in calls[0]
    ]
    assert len(tried) > 300


def test_random_literals_are_often_read() -> None:
    rng = random.Random(1)
    texts = [random_literal("javascript", "array", rng) for _ in range(200)]
    assert sum(read_literal("javascript", text, "array", "String") != text for text in texts) > 60
