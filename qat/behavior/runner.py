"""Asks a served model the cases of a suite and writes one judged result a line.

The runner talks to `POST /v1/chat/completions` of any OpenAI-compatible server. Transport errors and HTTP 5xx are tried
again with growing pauses; an answer is never asked for twice, however wrong it is. Results are appended as they come
and synced to disk in groups, so a dead server or a killed process costs only the questions that were under way: the
next call asks the rest, and those that ended in an error.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from qat.behavior.answers import AnsweredBy, BadAnswer
from qat.behavior.checks import BoundCheck, CheckError, Reply
from qat.behavior.client import ChatClient, in_parallel
from qat.behavior.conversation import Talk, converse
from qat.behavior.journal import Journal
from qat.behavior.records import (
    Case,
    CaseResult,
    FailedCheck,
    ResultKey,
    ResultMeta,
    meta_path,
    read_meta,
    read_results,
)
from qat.behavior.selection import EVERYTHING, Selection
from qat.behavior.suite import Suite
from qat.errors import UserError
from qat.progress import Progress, progress_bar
from qat.recipe.schema import BehaviorBlock, Sampling
from qat.runs import write_atomic

MAX_ERRORS_IN_A_ROW = 20
"""So many questions without one answer between them, and the run stops: the server is broken, not a question."""


class RunSummary(NamedTuple):
    """What one call of `run_suite` did.

    Attributes:
        arm: Name of the arm.
        results: The result file.
        asked: Questions asked by this call.
        resumed: Questions answered by earlier calls.
        passed: Passed results among all in the file that belong to this run.
        errors: Questions that ended in an error, in all.
        error_kinds: Their number by kind (`timeout`, `HTTP 400`, `not JSON`, …), most frequent first.
        malformed: Answers of this call whose content was null without a call (`null content`) or whose tool arguments
            are no JSON object (`broken arguments`). Models do both; checks judge them, and they are no errors.
        requests: HTTP requests of this call, retries included.
        completion_tokens: Of this call.
        seconds: Wall time of this call.
    """

    arm: str
    results: Path
    asked: int
    resumed: int
    passed: int
    errors: int
    error_kinds: dict[str, int]
    malformed: dict[str, int]
    requests: int
    completion_tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For the receipt."""
        return self._asdict() | {"results": self.results.name, "seconds": round(self.seconds, 3)}


class _Question(NamedTuple):
    case: Case
    sampling: Sampling
    seed: int

    @property
    def key(self) -> ResultKey:
        return ResultKey(self.case.id, self.sampling.name, self.seed)


class _Tally:
    """Counts over results, which are not kept: ten thousand answers need no more memory than one."""

    def __init__(self) -> None:
        self.asked = self.passed = self.tokens = 0
        self.errors: Counter[str] = Counter()
        self.malformed: Counter[str] = Counter()

    def add(self, result: CaseResult) -> None:
        self.asked += 1
        self.passed += result.passed
        self.tokens += result.completion_tokens
        if result.error_kind is not None:
            self.errors[result.error_kind] += 1
        for message in result.produced:
            calls = Reply([message]).calls
            self.malformed["null content"] += message.get("content") is None and not calls
            self.malformed["broken arguments"] += any(call.arguments is None for call in calls)


def run_suite(
    suite: Suite,
    url: str,
    model: str,
    arm: str,
    block: BehaviorBlock,
    out: Path,
    progress: Progress | None = None,
    *,
    selection: Selection = EVERYTHING,
    stream: bool | None = None,
    token_ids: bool = False,
) -> RunSummary:
    """Ask every case under every sampling and seed of the block that `out` does not hold yet.

    Args:
        suite: The resolved suite.
        url: Root of the server, with or without `/v1`.
        model: Name under which the server knows the model.
        arm: Name of the arm, written into every result.
        block: Samplings, token limit and concurrency.
        out: Result file (`behavior/<arm>.jsonl`), continued where it exists; `<arm>.meta.json` beside it says what it
            was made with.
        progress: Where to report; by default a bar of its own. What it counts is on disk.
        selection: Which cases; the results carry the hash of the whole suite all the same.
        stream: Whether to ask for streams; None: where a check of the suite needs the time to the first token.
        token_ids: Record the ids of the answers' tokens, which `divergence` needs; vLLM gives them.

    Raises:
        UserError: The server is unreachable, dies or refuses the model; `out` was made with another suite, model or
            sampling; the disk is full. Everything answered by then is in `out`.
    """
    started = time.monotonic()
    if stream is None:
        stream = any(check.name == "max_first_token" for case in suite.cases for check in suite.script(case).all_checks)
    questions = list(_questions(suite, block, selection))
    meta = _meta(suite, model, block, stream)
    done = _open_results(meta, arm, out)
    open_questions = [q for q in questions if q.key not in done]
    label: AbstractContextManager[Progress] = (
        nullcontext(progress) if progress is not None else progress_bar(f"behaviour of {arm}", len(questions))
    )
    client = ChatClient(url, model, block.max_tokens, block.concurrency, stream, token_ids)
    tally = _Tally()
    with label as bar:
        asyncio.run(_ask_all(client, suite, arm, open_questions, out, block.concurrency, len(questions), bar, tally))
    return RunSummary(
        arm=arm,
        results=out,
        asked=tally.asked,
        resumed=len(questions) - len(open_questions),
        passed=tally.passed + sum(done[q.key] for q in questions if q.key in done),
        errors=tally.errors.total(),
        error_kinds=dict(tally.errors.most_common()),
        malformed={kind: count for kind, count in tally.malformed.items() if count},
        requests=client.requests,
        completion_tokens=tally.tokens,
        seconds=time.monotonic() - started,
    )


def repeated(block: BehaviorBlock, times: int) -> BehaviorBlock:
    """The block with every sampling asked `times` times: `greedy`, `greedy_2`, …, with the same settings and seeds.

    Repeats at one temperature and seed measure what a server does not repeat: the flips of an arm against itself.
    """
    passes = [
        sampling if number == 1 else sampling.model_copy(update={"name": f"{sampling.name}_{number}"})
        for sampling in block.sampling
        for number in range(1, times + 1)
    ]
    if twice := [name for name, count in Counter(s.name for s in passes).items() if count > 1]:
        raise UserError("A repeat has the name of another sampling.", value=twice[0], remedy="rename that sampling")
    return block.model_copy(update={"sampling": tuple(passes)})


def _questions(suite: Suite, block: BehaviorBlock, selection: Selection) -> Iterator[_Question]:
    chosen = selection.ids(suite)
    for sampling in block.sampling:
        for seed in sampling.seeds:
            for case in suite.cases[: sampling.limit]:
                if case.id in chosen:
                    yield _Question(case, sampling, seed)


def _open_results(wanted: ResultMeta, arm: str, out: Path) -> dict[ResultKey, bool]:
    """Whether they passed, of the results to keep from earlier calls.

    A torn last line is cut off; questions that ended in an error are asked again.
    """
    if not out.is_file():
        write_atomic(meta_path(out), wanted.model_dump_json(indent=2) + "\n")
        return {}
    found = read_meta(out)
    _require_same(found, wanted, out)
    results, whole = read_results(out)
    if whole < out.stat().st_size:
        with out.open("r+b") as file:
            file.truncate(whole)
    if strangers := {result.arm for result in results.values()} - {arm}:
        raise UserError(
            "The results are of another arm.", where=str(out), value=f"{', '.join(sorted(strangers))}, not {arm}"
        )
    merged = wanted.model_copy(update={"samplings": {**(found.samplings if found else {}), **wanted.samplings}})
    write_atomic(meta_path(out), merged.model_dump_json(indent=2) + "\n")
    return {key: result.passed for key, result in results.items() if result.error is None}


def _meta(suite: Suite, model: str, block: BehaviorBlock, stream: bool) -> ResultMeta:
    return ResultMeta(
        suite=suite.name,
        version=suite.version,
        sha256=suite.sha256,
        model=model,
        max_tokens=block.max_tokens,
        samplings={s.name: {"temperature": s.temperature, "top_p": s.top_p} for s in block.sampling},
        stream=stream,
    )


def _require_same(found: ResultMeta | None, wanted: ResultMeta, out: Path) -> None:
    remedy = f"remove {out.name} to ask again, or write to another file"
    if found is None:
        raise UserError("Nothing says what these results were made with.", where=str(meta_path(out)), remedy=remedy)
    for field in ("suite", "sha256", "model", "max_tokens", "stream"):
        if getattr(found, field) != getattr(wanted, field):
            raise UserError(
                f"The results were made with another {'suite content' if field == 'sha256' else field}.",
                where=str(out),
                value=f"{getattr(found, field)}, now {getattr(wanted, field)}",
                remedy=remedy,
            )
    for name, settings in wanted.samplings.items():
        if name in found.samplings and found.samplings[name] != settings:
            raise UserError(
                f"The results of sampling {name!r} were made with other settings.",
                where=str(out),
                value=f"{found.samplings[name]}, now {settings}",
                remedy=remedy,
            )


async def _ask_all(
    client: ChatClient,
    suite: Suite,
    arm: str,
    questions: list[_Question],
    out: Path,
    concurrency: int,
    total: int,
    bar: Progress,
    tally: _Tally,
) -> None:
    """Work through the questions with `concurrency` workers; whatever ends it, finished answers are on disk then."""
    waiting = iter(questions)
    resumed = total - len(questions)
    bar.update(resumed)
    in_a_row = 0
    with Journal(out) as journal:

        async def worker() -> None:
            nonlocal in_a_row
            for question in waiting:
                result = await _ask(client, suite, arm, question)
                journal.append(result)
                tally.add(result)
                bar.update(resumed + journal.on_disk)
                in_a_row = in_a_row + 1 if _unanswered(result) else 0
                if in_a_row >= MAX_ERRORS_IN_A_ROW:
                    raise UserError(
                        f"{in_a_row} questions in a row got no answer.",
                        where=client.url,
                        value=result.error,
                        remedy="see the server's log and repeat the command: answers so far are kept",
                    )

        async with client:
            await in_parallel(worker, min(concurrency, len(questions)))
    bar.update(resumed + journal.on_disk)


def _unanswered(result: CaseResult) -> bool:
    """Whether the server failed; not where it refused the conversation, or a check could not judge what it said."""
    return result.error is not None and not result.error.startswith(("HTTP 4", "check "))


async def _ask(client: ChatClient, suite: Suite, arm: str, question: _Question) -> CaseResult:
    case, sampling, seed = question
    script = suite.script(case)
    talk, failures, error = Talk(), [], None

    async def ask(messages: list[dict[str, Any]]) -> AnsweredBy:
        return await client.chat(messages, case.tools or [], sampling.temperature, sampling.top_p, seed)

    try:
        await converse(case, script, ask, talk)
        for number, (turn, reply) in enumerate(zip(script.turns, talk.replies, strict=False), start=1):
            failures += await _judge(turn.checks, reply, f"turn {number}: ")
        failures += await _judge(script.checks, talk.whole(case))
        failures += talk.unreached(case)
    except (BadAnswer, CheckError) as fault:
        failures, error = [], str(fault)
    return CaseResult(
        case=case.id,
        category=case.category,
        arm=arm,
        sampling=sampling.name,
        seed=seed,
        produced=talk.produced,
        passed=error is None and not failures,
        failed_checks=failures,
        latency_s=round(talk.seconds, 4),
        completion_tokens=talk.completion_tokens,
        first_token_s=None if talk.first_token_s is None else round(talk.first_token_s, 4),
        error=error,
    )


async def _judge(checks: tuple[BoundCheck, ...], reply: Reply, where: str = "") -> list[FailedCheck]:
    """The checks that the reply fails; those that wait for others do so in threads.

    Raises:
        CheckError: A check could not judge; the text begins with `check <name>`.
    """
    failures = []
    for check in checks:
        try:
            result = await asyncio.to_thread(check.__call__, reply) if check.waits else check(reply)
        except CheckError as error:
            raise CheckError(f"check {check.name}: {error}") from error
        if not result.passed:
            failures.append(FailedCheck(check=check.name, detail=where + result.detail))
    return failures
