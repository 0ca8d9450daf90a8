"""Questions that end in an error: never a pass bought, never a failure invented."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat.behavior.gate import Decision, Verdict, judge
from tests.unit.behavior.helpers import small_suite
from tests.unit.behavior.test_gate import Passes, arm, gate, good, result, write

COUNT = 400


def judged(
    folder: Path, refused: range, passes: Passes = good, reference_refused: range = range(0), **more: float
) -> Verdict:
    """The candidate and the reference pass alike, but for the questions that are refused."""
    suite = small_suite(folder, COUNT)
    files = {
        name: write(
            folder, suite, name,
            [result(name, n, False, error="HTTP 400: too long", failed_checks=[]) if n in out
             else result(name, n, passes(n, 0)) for n in range(COUNT)],
        )
        for name, out in (("old", reference_refused), ("new", refused))
    }  # fmt: skip
    return judge(files, suite, gate(**more))


def test_a_few_errors_are_told_and_counted_against_the_candidate(tmp_path: Path) -> None:
    found = judged(tmp_path, range(397, 400))
    assert found.verdict is Decision.PASS
    assert found.reasons[0] == "new: 3 of 400 questions ended in an error, first c-397: HTTP 400: too long"
    assert "reaches the floor of 90.0%, whichever way 3 errors had gone" in found.reasons[1]
    assert (found.arms["new"].overall.n, found.arms["new"].errors) == (397, 3)


@pytest.mark.parametrize("of_the_reference", [False, True])
def test_too_many_errors_leave_the_verdict_open(tmp_path: Path, of_the_reference: bool) -> None:
    """The answers alone would pass; 20 refused questions could hide a drop of five points, on either side."""
    hidden, none = range(380, 400), range(0)
    if of_the_reference:
        found = judged(tmp_path, none, lambda n, s: n < 380, reference_refused=hidden)
    else:
        found = judged(tmp_path, hidden)
    assert found.verdict is Decision.INCONCLUSIVE
    assert any("as 20 errors could have gone either way" in reason for reason in found.reasons)
    assert found.comparisons[0].flips_worse == []


def test_errors_of_the_reference_hide_no_drop_where_the_candidate_passes(tmp_path: Path) -> None:
    assert judged(tmp_path, range(0), reference_refused=range(380, 400)).verdict is Decision.PASS


def test_errors_alone_are_no_failure(tmp_path: Path) -> None:
    """All that was answered failed, which would miss the floor; 370 of 400 questions were never answered."""
    found = judged(tmp_path, range(30, 400), passes=lambda n, s: False)
    assert found.verdict is Decision.INCONCLUSIVE


def test_a_failure_that_errors_cannot_explain_stands(tmp_path: Path) -> None:
    found = judged(tmp_path, range(395, 400), passes=lambda n, s: n % 2 == 0)
    assert found.verdict is Decision.FAIL
    assert "misses the floor of 90.0%, whichever way 5 errors had gone" in found.reasons[1]


def test_nothing_but_errors_is_inconclusive(tmp_path: Path) -> None:
    found = judged(tmp_path, range(COUNT))
    assert found.verdict is Decision.INCONCLUSIVE
    assert found.arms["new"].overall.rate is None
    assert found.verdict.exit_code == 3


@pytest.mark.parametrize("errors", [0, 1, 15, 30])
def test_an_error_never_helps(tmp_path: Path, errors: int) -> None:
    """Turning failures into errors must not turn a verdict into PASS: the 30 refused cases are those that failed."""
    failing: Passes = lambda n, s: n >= 30  # noqa: E731
    suite = small_suite(tmp_path, COUNT)
    old = arm(tmp_path, suite, "old", failing)
    rows = [
        result("new", n, False, error="HTTP 400", failed_checks=[]) if n < errors else result("new", n, failing(n, 0))
        for n in range(COUNT)
    ]
    found = judge({"old": old, "new": write(tmp_path, suite, "new", rows)}, suite, gate(pass_floor=0.93))
    assert found.verdict is Decision.INCONCLUSIVE
