"""The measured quality of the checks: by hand, by statsmodels, and against what is published."""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.inter_rater import cohens_kappa

from qat.behavior.checks import Reply, check_names
from qat.behavior.quality import LABELS, LabelledReply, agreement, half_of, load_labels, measure, page, results, share
from qat.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
FOREIGN = {"judge", "python"}
"""Checks whose verdict is somebody else's, a model's or a function's: what these may say is labelled in
`verdicts.json`, by which their own tests go."""
OF_EVALUATIONS = {"bfcl", "extraction"}
"""Registered when the evaluations are imported, which have references of their own."""
TIMED = {"max_latency", "max_first_token"}
SCRIPTS = {*"LATIN KANNADA DEVANAGARI TAMIL TELUGU CJK HIRAGANA HANGUL ARABIC CYRILLIC GREEK".split()}


def test_precision_and_recall_by_hand() -> None:
    """Two faults found, one missed, one false alarm among five replies: precision 2/3, recall 2/3."""
    rows = [("😊", "fail"), ("a 🎉", "fail"), ("done :-)", "fail"), ("✔", "pass"), ("fine", "pass")]
    records = [
        LabelledReply(str(i), "", "", "held_out", Reply([{"content": text}]), {"no_emoji": label}, {}, {})  # type: ignore[dict-item]
        for i, (text, label) in enumerate(rows)
    ]
    (quality,) = measure(records)
    assert (quality.n, quality.faulty, quality.missed, quality.false_alarms) == (5, 3, ["2"], ["3"])
    assert quality.precision.value == quality.recall.value == pytest.approx(2 / 3)
    # Wilson, 2 of 3, by hand: centre (2/3 + z²/6) / (1 + z²/3) with z² = 3.8415.
    z2 = 3.841459
    assert quality.recall.low is not None and quality.recall.high is not None
    assert (quality.recall.low + quality.recall.high) / 2 == pytest.approx((2 / 3 + z2 / 6) / (1 + z2 / 3), abs=1e-5)


def test_nothing_to_divide_by_is_no_zero() -> None:
    assert share(0, 0) == (None, None, None)


@pytest.mark.parametrize("table", [(20, 5, 10, 15), (40, 1, 2, 3), (10, 10, 10, 10), (1, 9, 8, 2), (50, 0, 1, 4)])
def test_kappa_agrees_with_statsmodels(table: tuple[int, int, int, int]) -> None:
    both, left, right, neither = table
    pairs = [(True, True)] * both + [(True, False)] * left + [(False, True)] * right + [(False, False)] * neither
    expected = cohens_kappa(np.array([[both, left], [right, neither]]))
    found = agreement(pairs)
    assert found.n == sum(table)
    assert found.observed == pytest.approx((both + neither) / sum(table))
    assert found.kappa == pytest.approx(expected.kappa)
    assert found.interval is not None
    assert found.interval.low == pytest.approx(max(-1, expected.kappa - 1.959964 * math.sqrt(expected.var_kappa)))
    assert found.interval.high == pytest.approx(min(1, expected.kappa + 1.959964 * math.sqrt(expected.var_kappa)))


def test_kappa_where_chance_leaves_nothing() -> None:
    assert agreement([(True, True)] * 5) == (5, 1.0, None, None)
    with pytest.raises(ValueError, match="no verdicts"):
        agreement([])


def test_the_labels_are_what_their_description_says() -> None:
    records = load_labels()
    assert len(records) == 2395
    assert len({record.id for record in records}) == len(records)
    published = [record for record in records if record.id.startswith("real-")]
    assert len(published) >= len(records) / 3
    assert {record.licence for record in published} == {"Apache-2.0"}
    assert all(len(record.reply.final) <= 381 for record in published)
    halves = [record.half for record in records]
    assert 0.45 < halves.count("held_out") / len(halves) < 0.55
    assert any("ಕ" <= char <= "ಹ" for record in records for char in record.reply.final)


def _labelled_texts() -> dict[tuple[str, str], list[str]]:
    """(check, label) to what the model (or the judge) wrote, calls as JSON."""
    found: dict[tuple[str, str], list[str]] = {}
    for record in load_labels():
        for name, label in record.labels.items():
            found.setdefault((name, label), []).append(json.dumps(record.reply.produced, ensure_ascii=False))
            if calls := [call.raw for call in record.reply.calls]:
                found[name, label][-1] += "".join(calls)
    for name, rows in json.loads((Path(__file__).parent / "verdicts.json").read_text(encoding="utf-8")).items():
        for row in rows:
            found.setdefault((name, row["label"]), []).append(row["text"])
    return found


def _scripts(texts: list[str]) -> set[str]:
    return {unicodedata.name(char, "").split(" ")[0] for char in {*"".join(texts)}} & SCRIPTS


def test_every_check_has_forty_labels_of_either_kind_in_several_scripts() -> None:
    texts = _labelled_texts()
    checks = set(check_names()) - OF_EVALUATIONS
    assert {name for name, _ in texts} == checks
    few = {key: len(texts.get(key, ())) for name in checks for key in ((name, "pass"), (name, "fail"))}
    assert not {key: count for key, count in few.items() if count < 40}
    for name in checks - TIMED:
        assert "KANNADA" in _scripts(texts[name, "pass"]) & _scripts(texts[name, "fail"]), name
        assert len(_scripts(texts[name, "pass"] + texts[name, "fail"])) >= 3, name


def test_a_time_near_its_limit_is_labelled_on_either_side() -> None:
    for name, field in (("max_latency", "latency_s"), ("max_first_token", "first_token_s")):
        excess = [
            (getattr(record.reply, field) / record.params[name]["seconds"] - 1, record.labels[name])
            for record in load_labels()
            if name in record.labels
        ]
        assert all((label == "pass") == (over <= 0) for over, label in excess)
        near = {label for over, label in excess if abs(over) < 0.01}
        assert near == {"pass", "fail"} and any(over == 0 for over, _ in excess)


def test_the_second_reading_says_what_the_description_says() -> None:
    read = json.loads((LABELS / "second_reading.json").read_text(encoding="utf-8"))["verdicts"]
    labels = {record.id: record.labels for record in load_labels()}
    pairs = [(verdict, labels[key][check]) for check, found in read.items() for key, verdict in found.items()]
    assert len(pairs) == 237 and sum(mine == theirs for mine, theirs in pairs) == 237
    assert all({"pass", "fail"} == set(found.values()) for found in read.values())


def test_the_half_depends_on_the_reply_alone() -> None:
    assert half_of({"content": "a", "tool_calls": []}) == half_of({"tool_calls": [], "content": "a"})
    assert {half_of({"content": str(i)}) for i in range(20)} == {"held_out", "development"}


def test_the_published_quality_is_that_of_the_checks() -> None:
    published = json.loads((ROOT / "docs/benchmarks/checks.json").read_text(encoding="utf-8"))
    found = json.loads(json.dumps({"command": published["command"], **results(load_labels())}))
    assert found == published, "run python scripts/measure_checks.py"
    assert (ROOT / "docs/benchmarks/checks.md").read_text(encoding="utf-8") == page(published)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"id": "x"}',
        '{"id": "1", "source": "s", "licence": "l", "reply": {}, "context": {}, "labels": {"no_emoji": "maybe"}}',
    ],
)
def test_a_damaged_label_file_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    good: dict[str, Any] = {
        "id": "1",
        "source": "s",
        "licence": "l",
        "reply": {"content": "a"},
        "context": {},
        "labels": {},
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 2"):
        load_labels(tmp_path)


def test_a_folder_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        load_labels(tmp_path)
