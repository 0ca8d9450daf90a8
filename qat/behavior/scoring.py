"""The reference's replies, scored by the servers that are tested: what `divergence` compares.

The replies that the reference wrote are sent as token ids, with the prompts that they answered, to the server of every
arm, which says how likely each token was: `prompt_logprobs` of vLLM's /v1/completions lists the most likely tokens of
every position, at temperature 1. The reference goes first; what its server says is kept beside its results and is what
the others are compared with. A server that scores twice may answer differently (batches of another size round
differently), so the reference compared with itself shows how much of a divergence is noise.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qat.behavior.answers import AnsweredBy, BadAnswer
from qat.behavior.client import TEMPLATE_SETTINGS, ChatClient, in_parallel
from qat.behavior.conversation import Message, Talk, converse
from qat.behavior.divergence import SuiteDivergence, Sums, compare_position, mean
from qat.behavior.records import Case, CaseResult, divergence_path, read_meta, read_results
from qat.behavior.suite import Suite
from qat.errors import UserError
from qat.progress import Progress, progress_bar
from qat.recipe.schema import BehaviorBlock
from qat.storage import storage_fault, write_json

TOP = 20
"""Tokens listed at each position: as many as vLLM gives unless it is started with another --max-logprobs."""
_Row = TypeVar("_Row")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Head(_Record):
    """First line of a file of distributions."""

    format: Literal[1] = 1
    arm: str
    suite: str
    sha256: str
    sampling: str
    top: int


class _Scored(_Record):
    """One reply of the reference: its prompt, its tokens, and what the reference's server thinks of each."""

    case: str
    category: str
    prompt: list[int]
    tokens: list[int]
    distributions: list[dict[int, float]]


class _Unscored(NamedTuple):
    """One reply before it is scored, with the messages that it answered."""

    case: Case
    messages: list[Message]
    tokens: list[int]


def distributions_path(results: Path) -> Path:
    """Where the distributions of a reference lie, beside its results."""
    return results.with_suffix(".distributions.jsonl")


def diverge(
    suite: Suite, reference: Path, results: Path, url: str, model: str, block: BehaviorBlock
) -> SuiteDivergence:
    """Measure an arm against the reference and write `divergence_path(results)`.

    Where the reference's results are `results` themselves, this server is the reference's: its distributions are kept
    first, and what it then differs from itself by is noise.

    Args:
        suite: What was asked.
        reference: Result file of the reference.
        results: Result file of the arm.
        url: Of the arm's server.
        model: Its name there.
        block: Concurrency, the gate's sampling, and how many cases.

    Raises:
        UserError: See `record_reference` and `measure`.
    """
    if reference.resolve() == results.resolve():
        record_reference(suite, results, url, model, block)
    found = measure(reference, suite, url, model, concurrency=block.concurrency)
    write_json(divergence_path(results), found.to_json())
    return found


def record_reference(
    suite: Suite, results: Path, url: str, model: str, block: BehaviorBlock, progress: Progress | None = None
) -> int:
    """Score the reference's own replies by its own server, into `distributions_path(results)`: whole or not there.

    Args:
        suite: What was asked.
        results: The reference's result file; its answers carry `token_ids`.
        url: Of the server that gave them.
        model: Its name there.
        block: Concurrency, whose replies (those of the gate's sampling that ended in no error), and of how many cases.
        progress: Where to report; by default a bar of its own.

    Returns:
        Replies that the server could not score; nothing is compared on them.

    Raises:
        UserError: Answers without token ids, to another suite, or none of this sampling; the server is out of reach, is
            no vLLM, or scores none of the replies.
    """
    meta = read_meta(results)
    if meta is None or meta.sha256 != suite.sha256:
        raise UserError("The answers are to another suite.", where=str(results), value=f"not {suite.name}")
    chosen, sampling = {case.id for case in suite.cases[: block.divergence_cases]}, block.gate.sampling
    found = [one for one in read_results(results).results.values() if one.sampling == sampling and one.error is None]
    answers = [answer for answer in found if answer.case in chosen]
    questions = asyncio.run(_all_replies(suite, answers, results))
    if not questions:
        raise UserError("There are no replies to score.", where=str(results), value=f"sampling {sampling!r}")
    head = _Head(arm=answers[0].arm, suite=suite.name, sha256=suite.sha256, sampling=sampling, top=TOP)
    client = ChatClient(url, model, 1, block.concurrency)

    async def score(question: _Unscored) -> None:
        prompt = await _prompt_ids(client, question)
        scored = _Scored(
            case=question.case.id,
            category=question.case.category,
            prompt=prompt,
            tokens=question.tokens,
            distributions=await _distributions(client, prompt, question.tokens),
        )
        file.write(scored.model_dump_json() + "\n")

    with _written(distributions_path(results)) as file:
        file.write(head.model_dump_json() + "\n")
        return _score_all(client, iter(questions), score, f"distributions of {head.arm}", len(questions), progress)


def measure(
    reference: Path, suite: Suite, url: str, model: str, *, concurrency: int, progress: Progress | None = None
) -> SuiteDivergence:
    """Score the reference's replies by an arm's server and compare.

    Args:
        reference: The reference's result file, whose distributions lie beside it.
        suite: The suite that the arm is asked.
        url: Of the arm's server.
        model: Its name there.
        concurrency: Requests under way together.
        progress: Where to report; by default a bar of its own.

    Raises:
        UserError: No such file, a damaged one or one of another suite; the server is out of reach, is no vLLM, or
            scores none of the replies.
    """
    path = distributions_path(reference)
    head = require_reference(reference, suite)
    with path.open(encoding="utf-8") as file:
        count = sum(1 for _ in file) - 1
    client = ChatClient(url, model, 1, concurrency)
    by_case: dict[tuple[str, str], Sums] = defaultdict(Sums)

    async def score(row: _Scored) -> None:
        found = await _distributions(client, row.prompt, row.tokens)
        for known, given in zip(row.distributions, found, strict=True):
            by_case[row.category, row.case].add(compare_position(known, given))

    unscored = _score_all(client, _rows(path), score, f"divergence of {model}", count, progress)
    categories = dict.fromkeys(category for category, _ in sorted(by_case))
    return SuiteDivergence(
        reference=head.arm,
        suite=head.suite,
        sha256=head.sha256,
        sampling=head.sampling,
        top=head.top,
        unscored=unscored,
        overall=mean([by_case[key] for key in sorted(by_case)]),
        categories={name: mean([by_case[key] for key in sorted(by_case) if key[0] == name]) for name in categories},
    )


def require_reference(reference: Path, suite: Suite) -> _Head:
    """Say at once, before anything is asked, where there is nothing to compare with.

    Raises:
        UserError: The reference has no distributions, or they are of another suite.
    """
    path = distributions_path(reference)
    try:
        with path.open(encoding="utf-8") as file:
            head = _Head.model_validate_json(file.readline())
    except FileNotFoundError:
        raise UserError(
            "The reference has no distributions to compare with.",
            where=str(path),
            remedy=f"ask its server first: qat test --url … --out {reference} --divergence-from {reference}",
        ) from None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise UserError("The distributions cannot be read.", where=str(path), value=str(error)) from error
    if head.sha256 != suite.sha256:
        raise UserError(
            "The distributions are of replies to another suite.",
            where=str(path),
            value=f"{head.suite} {head.sha256[:12]}, now {suite.name} {suite.sha256[:12]}",
        )
    return head


# The reference's replies, as they were asked for ----------------------------------------------------------------------


async def _all_replies(suite: Suite, answers: Sequence[CaseResult], results: Path) -> list[_Unscored]:
    return [reply for answer in answers for reply in await _replies(suite.by_id[answer.case], suite, answer, results)]


async def _replies(case: Case, suite: Suite, answer: CaseResult, results: Path) -> list[_Unscored]:
    """Every reply of an answer with the messages that it answered: the case is played again with what was said."""
    said = iter(answer.produced)
    played: list[_Unscored] = []

    async def ask(messages: list[Message]) -> AnsweredBy:
        message = next(said, {})
        tokens = message.get("token_ids")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise UserError(
                "The answers do not say their token ids.",
                where=f"{results}, case {answer.case}",
                remedy="ask again into another file: token ids are recorded where --divergence-from names that file",
            )
        played.append(_Unscored(case, list(messages), tokens))
        return AnsweredBy({key: value for key, value in message.items() if key != "turn"}, 0)

    await converse(case, suite.script(case), ask, Talk())
    return played


async def _prompt_ids(client: ChatClient, question: _Unscored) -> list[int]:
    """The prompt as the server itself renders and tokenizes it for a chat completion."""
    body: dict[str, Any] = {
        "messages": question.messages,
        "add_generation_prompt": True,
        "chat_template_kwargs": TEMPLATE_SETTINGS,
    }
    if question.case.tools:
        body["tools"] = question.case.tools
    answer = await client.json("/tokenize", body)
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(tokens, list):
        raise UserError("The server does not tokenize conversations.", where=client.root, remedy="this needs vLLM")
    return tokens


async def _distributions(client: ChatClient, prompt: Sequence[int], tokens: Sequence[int]) -> list[dict[int, float]]:
    """What the server thinks of each token of a reply.

    Raises:
        BadAnswer: Nothing that could be read as distributions over these tokens.
        UserError: The server gives no log probabilities of prompts.
    """
    body = {"prompt": [*prompt, *tokens], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": TOP}
    answer = await client.json("/v1/completions", body)
    try:
        listed = answer["choices"][0].get("prompt_logprobs")
        if listed is None:
            raise UserError(
                "The server gives no log probabilities of prompts.", where=client.root, remedy="this needs vLLM"
            )
        found = [
            {int(token): round(float(entry["logprob"]), 6) for token, entry in position.items()}
            for position in listed[len(prompt) :]
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadAnswer(f"no prompt logprobs: {type(error).__name__} {error}") from None
    # The list holds the token itself, however unlikely, beside the most likely ones.
    if len(found) != len(tokens) or any(token not in top for token, top in zip(tokens, found, strict=True)):
        raise BadAnswer("no prompt logprobs: not of the tokens that were sent")
    return found


# Asking, and the file -------------------------------------------------------------------------------------------------


def _score_all(
    client: ChatClient,
    rows: Iterator[_Row],
    score: Callable[[_Row], Awaitable[None]],
    label: str,
    total: int,
    progress: Progress | None,
) -> int:
    """Score every row, as many at a time as the client has connections; the number that could not be scored.

    Raises:
        UserError: The server is out of reach, or not one could be scored.
    """
    faults: list[str] = []
    done = 0

    async def worker() -> None:
        nonlocal done
        for row in rows:
            try:
                await score(row)
            except BadAnswer as fault:
                faults.append(str(fault))
            done += 1
            bar.update(done)

    async def work() -> None:
        async with client:
            await in_parallel(worker, client.connections)

    shown = nullcontext(progress) if progress is not None else progress_bar(label, total)
    with shown as bar:
        asyncio.run(work())
    if len(faults) == done:
        raise UserError("Not one reply could be scored.", where=client.root, value=faults[-1] if faults else "none")
    return len(faults)


def _rows(path: Path) -> Iterator[_Scored]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                continue
            try:
                yield _Scored.model_validate_json(line)
            except ValidationError as error:
                raise UserError(
                    "The distributions are damaged.",
                    where=f"{path}, line {number}",
                    value=str(error.errors()[0]["msg"]),
                ) from error


@contextmanager
def _written(path: Path) -> Iterator[IO[str]]:
    """A file that appears under its name once it is whole and on disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise storage_fault(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
