"""Jobs over processes: order, loneliness, failures, time, and going on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat.matrix.jobs import Place
from qat.matrix.schedule import run
from tests.unit.matrix.jobs_for_tests import Sleeper


@pytest.mark.slow
def test_needs_failures_and_time(tmp_path: Path) -> None:
    place = Place(tmp_path, "check")
    jobs = [
        Sleeper("b/pretraining", alone=True, seconds=0.5),
        Sleeper("b/persona", ("b/pretraining",)),
        Sleeper("b/broken", fault="raise"),
        Sleeper("b/dead", ("b/broken",)),
        Sleeper("b/killed", fault="die"),
        Sleeper("b/long", ("b/persona",), seconds=600),
    ]
    lines: list[str] = []
    outcome = run(jobs, place, ["0"], 2, 15, lines.append)
    assert sorted(outcome.done) == ["b/persona", "b/pretraining"]
    assert "no such luck" in outcome.failed["b/broken"]
    assert "status 9" in outcome.failed["b/killed"]
    assert outcome.left == ["b/dead", "b/long"]
    assert "[    0 s] 0: b/pretraining" in lines[0]
    found = {name: json.loads(place.result(f"b/{name}").read_text()) for name in ("pretraining", "persona")}
    assert found["persona"]["begun"] >= found["pretraining"]["ended"]
    assert found["persona"]["gpu"] == "0"
    again = run(jobs[:2], place, ["0"], 1, 5, lines.append)
    assert sorted(again.done) == ["b/persona", "b/pretraining"]
    assert again.left == []
