"""Parts of a suite: shards are disjoint and the whole, and their results join to those of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qat.behavior.records import read_meta, read_results
from qat.behavior.runner import run_suite
from qat.behavior.selection import Selection, merge_results
from qat.errors import UserError
from tests.unit.behavior.helpers import block, small_suite
from tests.unit.behavior.stub_server import completion, serving
from tests.unit.behavior.test_runner import Quiet, question


def parity(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
    return 200, completion("Yes." if int(question(body).split()[1]) % 2 else "No.")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 25])
@pytest.mark.parametrize("only", [(), ("k1",), ("c-00*", "c-019")])
def test_shards_are_disjoint_and_the_whole(tmp_path: Path, count: int, only: tuple[str, ...]) -> None:
    suite = small_suite(tmp_path, 20)
    parts = [Selection.parse(only, f"{i}/{count}").ids(suite) for i in range(1, count + 1)]
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert set().union(*parts) == Selection.parse(only, None).ids(suite)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_only_meets_id_category_and_tag(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, 4, tags=["fast"])
    assert Selection(("c-002",)).ids(suite) == {"c-002"}
    assert Selection(("k0", "c-003")).ids(suite) == {"c-000", "c-002", "c-003"}
    assert len(Selection(("fa*",)).ids(suite)) == 4
    with pytest.raises(UserError, match="categories: k0, k1"):
        Selection(("K0",)).ids(suite)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(UserError, match="no shard"):
        Selection.parse((), text)


def test_shards_join_to_one_run(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, 20)
    whole, parts = tmp_path / "whole.jsonl", [tmp_path / f"{i}.jsonl" for i in (1, 2, 3)]
    asked = block(sampling=[{"name": "warm", "temperature": 0.7, "seeds": [1, 2], "limit": 11}])
    with serving(parity) as stub:
        run_suite(suite, stub.url, "m", "new", asked, whole, Quiet())
        for number, part in enumerate(parts, 1):
            run_suite(suite, stub.url, "m", "new", asked, part, Quiet(), selection=Selection(shard=number, shards=3))
        assert merge_results(parts, tmp_path / "merged.jsonl") == 22
        again = run_suite(suite, stub.url, "m", "new", asked, tmp_path / "merged.jsonl", Quiet())
    assert (again.asked, again.resumed, again.passed) == (0, 22, 10)
    outcome = [{k: r.passed for k, r in read_results(p).results.items()} for p in (whole, tmp_path / "merged.jsonl")]
    assert outcome[0] == outcome[1]
    assert read_meta(tmp_path / "merged.jsonl") == read_meta(whole)
    with pytest.raises(UserError, match="exists"):
        merge_results(parts, whole)


def test_what_does_not_belong_together_is_not_joined(tmp_path: Path) -> None:
    suite, a, b = small_suite(tmp_path, 4), tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    with serving(parity) as stub:
        run_suite(suite, stub.url, "m", "new", block(), a, Quiet())
        for change, text in (({"model": "other"}, "another model"), ({"arm": "other"}, "different arms")):
            b.unlink(missing_ok=True)
            run_suite(suite, stub.url, change.get("model", "m"), change.get("arm", "new"), block(), b, Quiet())
            with pytest.raises(UserError, match=text):
                merge_results([a, b], tmp_path / "out.jsonl")
    with serving(lambda body, n: (200, completion("Else."))) as stub:
        b.unlink()
        run_suite(suite, stub.url, "m", "new", block(), b, Quiet())
    with pytest.raises(UserError, match="differently"):
        merge_results([a, b], tmp_path / "out.jsonl")
    b.with_suffix(".meta.json").unlink()
    with pytest.raises(UserError, match="Nothing says"):
        merge_results([b, a], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_come_in_the_order_of_the_suite(tmp_path: Path) -> None:
    suite, out = small_suite(tmp_path, 12), tmp_path / "new.jsonl"
    with serving(parity) as stub:
        run_suite(suite, stub.url, "m", "new", block(), out, Quiet())
    lines = sorted(out.read_text(encoding="utf-8").splitlines(), reverse=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = Selection(("c-00*",)).answers(suite, out)
    assert [one.case for one in found] == [f"c-{n:03}" for n in range(10)]
