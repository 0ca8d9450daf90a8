"""Asks a served model the cases of a suite and writes one judged result a line.

The runner talks to `POST /v1/chat/completions` of any OpenAI-compatible server. Transport errors and HTTP 5xx are tried
again with growing pauses; an answer is never asked for twice, however wrong it is. Results are appended as they come
and synced to disk in groups, so a dead server or a killed process costs only the questions that were under way: the
next call asks the rest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from qat.behavior.checks import Reply
from qat.behavior.client import AnsweredBy, ChatClient, Refused
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
from qat.behavior.suite import Suite
from qat.errors import UserError
from qat.progress import Progress, progress_bar
from qat.recipe.schema import BehaviorBlock, Sampling
from qat.runs import write_atomic

MAX_TOOL_ROUNDS = 3
"""How often scripted tool results are fed within one case; a model that calls on and on is stopped there."""


class RunSummary(NamedTuple):
    """What one call of `run_suite` did.

    Attributes:
        arm: Name of the arm.
        results: The result file.
        asked: Questions asked by this call.
        resumed: Questions answered by earlier calls.
        passed: Passed results among all in the file that belong to this run.
        errors: Cases that the server refused, in all.
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


def run_suite(
    suite: Suite, url: str, model: str, arm: str, block: BehaviorBlock, out: Path, progress: Progress | None = None
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
        progress: Where to report; by default a bar of its own.

    Raises:
        UserError: The server is unreachable, dies or refuses the model; `out` was made with another suite, model or
            sampling; the disk is full. Everything answered by then is in `out`.
    """
    started = time.monotonic()
    questions = list(_questions(suite, block))
    done = _open_results(suite, model, arm, block, out)
    open_questions = [q for q in questions if q.key not in done]
    label: AbstractContextManager[Progress] = (
        nullcontext(progress) if progress is not None else progress_bar(f"behaviour of {arm}", len(questions))
    )
    client = ChatClient(url, model, block.max_tokens, block.concurrency)
    with label as bar:
        fresh = asyncio.run(_ask_all(client, suite, arm, open_questions, out, block.concurrency, len(questions), bar))
    results = [*(done[q.key] for q in questions if q.key in done), *fresh]
    return RunSummary(
        arm=arm,
        results=out,
        asked=len(fresh),
        resumed=len(questions) - len(open_questions),
        passed=sum(result.passed for result in results),
        errors=sum(result.error is not None for result in results),
        requests=client.requests,
        completion_tokens=sum(result.completion_tokens for result in fresh),
        seconds=time.monotonic() - started,
    )


def _questions(suite: Suite, block: BehaviorBlock) -> Iterator[_Question]:
    for sampling in block.sampling:
        for seed in sampling.seeds:
            for case in suite.cases[: sampling.limit]:
                yield _Question(case, sampling, seed)


def _open_results(suite: Suite, model: str, arm: str, block: BehaviorBlock, out: Path) -> dict[ResultKey, CaseResult]:
    """Results to keep from earlier calls; a torn last line is cut off, refused cases are asked again."""
    wanted = _meta(suite, model, block)
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
    return {key: result for key, result in results.items() if result.error is None}


def _meta(suite: Suite, model: str, block: BehaviorBlock) -> ResultMeta:
    return ResultMeta(
        suite=suite.name,
        version=suite.version,
        sha256=suite.sha256,
        model=model,
        max_tokens=block.max_tokens,
        samplings={s.name: {"temperature": s.temperature, "top_p": s.top_p} for s in block.sampling},
    )


def _require_same(found: ResultMeta | None, wanted: ResultMeta, out: Path) -> None:
    remedy = f"remove {out.name} to ask again, or write to another file"
    if found is None:
        raise UserError("Nothing says what these results were made with.", where=str(meta_path(out)), remedy=remedy)
    for field in ("suite", "sha256", "model", "max_tokens"):
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
) -> list[CaseResult]:
    """Work through the questions with `concurrency` workers; whatever ends it, finished answers are on disk then."""
    waiting = iter(questions)
    results: list[CaseResult] = []
    resumed = total - len(questions)
    bar.update(resumed)
    with Journal(out) as journal:

        async def worker() -> None:
            for question in waiting:
                result = await _ask(client, suite, arm, question)
                journal.append(result)
                results.append(result)
                bar.update(resumed + len(results))

        async with client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(concurrency, len(questions))):
                        group.create_task(worker())
            except BaseExceptionGroup as group:
                # Every worker meets the dead server: one message is enough. Anything else in the group is a bug and
                # keeps its traceback.
                faults, others = group.split(UserError)
                if faults is None or others is not None:
                    raise
                raise faults.exceptions[0] from None
    return results


async def _ask(client: ChatClient, suite: Suite, arm: str, question: _Question) -> CaseResult:
    case, sampling, seed = question
    started = time.monotonic()
    produced: list[dict[str, Any]] = []
    fed: list[str] = []
    tokens, error = 0, None
    try:
        tokens = await _converse(client, question, produced, fed)
    except Refused as refusal:
        error = str(refusal)
    reply = Reply(produced, case.messages, tuple(fed), case.tools or ())
    failures = (
        []
        if error
        else [FailedCheck(check=c.name, detail=r.detail) for c in suite.checks[case.id] if not (r := c(reply)).passed]
    )
    return CaseResult(
        case=case.id,
        category=case.category,
        arm=arm,
        sampling=sampling.name,
        seed=seed,
        produced=produced,
        passed=error is None and not failures,
        failed_checks=failures,
        latency_s=round(time.monotonic() - started, 4),
        completion_tokens=tokens,
        error=error,
    )


async def _converse(client: ChatClient, question: _Question, produced: list[dict[str, Any]], fed: list[str]) -> int:
    """Ask, feed scripted tool results and ask again while the model calls such tools; fills `produced` and `fed`."""
    case, sampling, seed = question
    messages = list(case.messages)
    tokens = 0
    for round_number in range(MAX_TOOL_ROUNDS + 1):
        answer: AnsweredBy = await client.chat(messages, case.tools or [], sampling.temperature, sampling.top_p, seed)
        produced.append(answer.message)
        tokens += answer.completion_tokens
        calls = Reply([answer.message]).calls
        # A call without a scripted result, or with arguments that no server would render back, ends the conversation:
        # it is judged as it is.
        if (
            not calls
            or round_number == MAX_TOOL_ROUNDS
            or any(c.name not in case.tool_results or c.arguments is None for c in calls)
        ):
            break
        messages.append(spoken(answer.message))
        for raw, call in zip(answer.message["tool_calls"], calls, strict=True):
            messages.append(
                {"role": "tool", "tool_call_id": raw.get("id") or "", "content": case.tool_results[call.name]}
            )
            fed.append(case.tool_results[call.name])
    return tokens


def spoken(message: dict[str, Any]) -> dict[str, Any]:
    """The message as it is sent back to the server: without what only the record keeps."""
    return {key: value for key, value in message.items() if key in ("role", "content", "tool_calls")}
