"""A pytest plugin: `pytest --qat-suite annie --qat-url http://127.0.0.1:8000` runs a suite as one test per case.

The cases join whatever else pytest collects, as `qat::<suite>::<case>`; `-k` and `-m` choose among them (marks: `qat`,
the category and the tags). What is chosen is asked at once, with the runner's concurrency, before the first test runs;
each test then tells how its case was judged. A question that ends in an error is an error of the test, not a failure.

Pass or fail of single cases is no verdict on the model: `--qat-results FILE` keeps the answers, and
`qat baseline check FILE NAME` judges them.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qat.errors import UserError

if TYPE_CHECKING:
    from qat.behavior.records import Case, CaseResult
    from qat.behavior.suite import Suite

SAMPLING = "greedy"
"""Name of the one pass: temperature 0, seed 0."""
_ANSWERS = pytest.StashKey["dict[str, CaseResult]"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options; without `--qat-suite` the plugin does nothing."""
    group = parser.getgroup("qat", "behaviour of a served model")
    group.addoption("--qat-suite", metavar="SUITE", help="Shipped suite or YAML file: one test per case.")
    group.addoption("--qat-url", metavar="URL", help="OpenAI-compatible server that is asked.")
    group.addoption("--qat-model", metavar="NAME", help="Its model; by default the first that it offers.")
    group.addoption("--qat-max-tokens", metavar="N", type=int, default=96, help="Longest reply; default 96.")
    group.addoption("--qat-concurrency", metavar="N", type=int, default=16, help="Requests under way; default 16.")
    group.addoption(
        "--qat-allow-python", action="store_true", help="Run the code that `python` checks name; read it first."
    )
    group.addoption("--qat-results", metavar="FILE", help="Keep the answers in this .jsonl file; it is continued.")


def pytest_configure(config: pytest.Config) -> None:
    """Announce the mark `qat`; refuse options that say nothing without each other."""
    config.addinivalue_line("markers", "qat: a case of a behaviour suite (--qat-suite)")
    suite, url = config.getoption("--qat-suite"), config.getoption("--qat-url")
    if (suite is None) != (url is None):
        raise pytest.UsageError("--qat-suite and --qat-url need each other")
    if suite is not None and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--qat-suite asks with --qat-concurrency by itself: leave -n of pytest-xdist out")
    results = config.getoption("--qat-results")
    if results is not None and not results.endswith(".jsonl"):
        raise pytest.UsageError("--qat-results: give a file that ends in .jsonl")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the cases, before `-k` and `-m` choose."""
    name = config.getoption("--qat-suite")
    if name is None:
        return
    from qat.behavior.checks.user_code import allow_user_code
    from qat.behavior.suite import load_suite

    allowed = config.getoption("--qat-allow-python")
    try:
        with allow_user_code(Path(name).resolve().parent) if allowed else nullcontext():
            suite = load_suite(name)
    except UserError as error:
        raise pytest.UsageError(str(error)) from error
    # A category or tag may be any text; marks are registered as they are met, so that --strict-markers holds.
    for mark in sorted({mark for case in suite.cases for mark in (case.category, *case.tags)}):
        config.addinivalue_line("markers", f"{mark}: cases of {suite.name}")
    parent = SuiteNode.from_parent(session, name=suite.name, suite=suite)
    cases = list(parent.collect())
    items.extend(cases)
    # The terminal counts collected tests by these reports.
    config.hook.pytest_collectreport(report=pytest.CollectReport(parent.nodeid, "passed", None, [*cases]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Ask what was chosen, before the first test.

    Raises:
        pytest.UsageError: The server or the result file cannot be used (`UserError` of the runner).
    """
    chosen = [item for item in session.items if isinstance(item, CaseItem)]
    if session.config.option.collectonly or not chosen:
        return
    try:
        session.config.stash[_ANSWERS] = _ask(session.config, chosen[0].suite, [item.case for item in chosen])
    except UserError as error:
        raise pytest.UsageError(str(error)) from error


class SuiteNode(pytest.Collector):
    """The suite, as the parent of its cases."""

    def __init__(self, *, suite: Suite, **more: Any) -> None:
        super().__init__(nodeid=f"qat::{suite.name}", **more)
        self.suite = suite

    def collect(self) -> Iterator[CaseItem]:
        """One test per case."""
        for case in self.suite.cases:
            yield CaseItem.from_parent(self, name=case.id, case=case, suite=self.suite)


class CaseItem(pytest.Item):
    """One case."""

    def __init__(self, *, case: Case, suite: Suite, **more: Any) -> None:
        super().__init__(**more)
        self.case, self.suite = case, suite
        for mark in ("qat", case.category, *case.tags):
            self.add_marker(mark)

    def setup(self) -> None:
        """A question that ended in an error is an error of the setup, which pytest reports apart from failures."""
        result = self.config.stash[_ANSWERS][self.case.id]
        if result.error is not None:
            pytest.fail(f"the question ended in an error: {result.error}", pytrace=False)

    def runtest(self) -> None:
        """Tell how the case was judged: what was asked, what came back, and which checks failed."""
        result = self.config.stash[_ANSWERS][self.case.id]
        self.user_properties += [("category", result.category), ("latency_s", result.latency_s)]
        if not result.passed:
            pytest.fail("\n".join(_told(self.case, result)), pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where the test stands; a generated case has no line of its own."""
        return self.path, None, self.nodeid


def _told(case: Case, result: CaseResult) -> Iterator[str]:
    yield f"asked:  {next((m.get('content') for m in reversed(case.messages) if m['role'] == 'user'), '')}"
    for message in result.produced:
        if message.get("content"):
            yield f"reply:  {message['content']}"
        for call in message.get("tool_calls") or []:
            yield f"called: {call['function']['name']}({call['function']['arguments']})"
    for failed in result.failed_checks:
        yield f"failed: {failed.check}: {failed.detail}"


def _ask(config: pytest.Config, suite: Suite, cases: list[Case]) -> dict[str, CaseResult]:
    from qat.behavior.client import first_model
    from qat.behavior.records import read_results
    from qat.behavior.runner import run_suite
    from qat.progress import progress_bar
    from qat.recipe.schema import BehaviorBlock, GateBlock, Sampling

    url = config.getoption("--qat-url")
    model = config.getoption("--qat-model") or first_model(url)
    block = BehaviorBlock(
        suite=suite.name,
        max_tokens=config.getoption("--qat-max-tokens"),
        concurrency=config.getoption("--qat-concurrency"),
        sampling=(Sampling(name=SAMPLING),),
        gate=GateBlock(candidate=model, reference=model),
    )
    with tempfile.TemporaryDirectory() as folder, progress_bar("", len(cases), enabled=False) as silent:
        out = Path(config.getoption("--qat-results") or Path(folder) / "answers.jsonl")
        # The hash stays that of the whole suite: the answers may be judged against a baseline of it.
        run_suite(dataclasses.replace(suite, cases=tuple(cases)), url, model, model, block, out, silent)
        found = read_results(out).results
    return {key.case: result for key, result in found.items() if key.sampling == SAMPLING}
