"""Filling quotas: try conversations until every brief has its count, its attempts are used up or a limit is met."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

from qat.behavior.answers import BadAnswer
from qat.behavior.checks import BoundCheck, Reply, bind
from qat.behavior.conversation import Script
from qat.behavior.demands import demands_of
from qat.behavior.suite import Suite
from qat.data.duplicates import user_turns
from qat.data.generate.novelty import Novelty, Phrases, words_of
from qat.data.generate.teacher.client import LimitReached, Spent, TeacherClient
from qat.data.generate.teacher.journal import Attempt, Journal, identity
from qat.data.generate.teacher.settings import Teacher
from qat.data.generate.teacher.talk import Message, Rejected, invent, play, record, spoken
from qat.data.schema import Conversation, Persona, Tool
from qat.errors import UserError
from qat.progress import Progress

MOST_FAILURES = 8
"""So many attempts in a row without a readable answer end the run: the teacher, not the conversations, is at fault."""
_SHOWN_TURNS = 8
_TIMING = ("max_latency", "max_first_token")


@dataclass(frozen=True)
class Brief:
    """What a number of conversations are to be.

    Attributes:
        name: Short, unique; part of the ids.
        category: Of the conversations.
        about: One line for the teacher.
        count: Accepted conversations to reach.
        lesson: What they are to exercise beyond their category.
        forbidden: Names and numbers that no user turn may hold.
    """

    name: str
    category: str
    about: str
    count: int
    lesson: str = ""
    forbidden: frozenset[str] = frozenset()


@dataclass
class TeacherReport:
    """What was made, over all calls for the file.

    Attributes:
        wanted: Brief to the count asked for.
        made: Brief to the count on disk.
        attempts: In all.
        rejected: Reason to how often.
        spent: Requests and tokens.
        cost: By the teacher's price; None without one.
        stopped: The limit that ended the run; None where none did.
    """

    wanted: dict[str, int]
    made: dict[str, int]
    attempts: int
    rejected: dict[str, int]
    spent: Spent
    cost: float | None
    stopped: str | None = None

    @property
    def complete(self) -> bool:
        """Whether every brief has its count."""
        return all(self.made[name] >= count for name, count in self.wanted.items())

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "wanted": self.wanted,
            "made": self.made,
            "complete": self.complete,
            "attempts": self.attempts,
            "rejected": self.rejected,
            "requests": self.spent.requests,
            "prompt_tokens": self.spent.prompt_tokens,
            "completion_tokens": self.spent.completion_tokens,
            "cost": self.cost,
            "stopped": self.stopped,
        }


def quotas(teacher: Teacher) -> list[Brief]:
    """One brief for each category of the settings.

    Raises:
        UserError: They name none.
    """
    if not teacher.categories:
        remedy = "say how many of which category; docs/data.md shows it"
        raise UserError("The teacher's file asks for no conversations.", where="categories", remedy=remedy)
    return [Brief(name, name, teacher.about(name), quota.count) for name, quota in teacher.categories.items()]


def checks_of(suite: Suite) -> dict[str, tuple[BoundCheck, ...]]:
    """Category to the checks on its replies; of a category that the suite does not know, what stands under "".

    These are the suite's demands on every reply, which the audit holds data to, and what all cases of the category make
    besides (that the memory is searched, say): a check that one case alone makes belongs to its question. Left out is
    what waits for a network or a user's code, or measures time.
    """
    always = {(name, params): bind(name, json.loads(params)) for name, params in demands_of([suite]).checks}
    made: dict[str, dict[tuple[str, str], BoundCheck]] = {"": always}
    for category in {case.category for case in suite.cases}:
        cases = [_keyed(suite.script(case)) for case in suite.cases if case.category == category]
        shared = set.intersection(*(set(case) for case in cases))
        made[category] = always | {key: check for key, check in cases[0].items() if key in shared}
    return {category: tuple(checks.values()) for category, checks in made.items()}


def _keyed(script: Script) -> dict[tuple[str, str], BoundCheck]:
    """A case's checks by name and parameters, as `Demands` names them; of a call only the tool, not the arguments."""
    keyed = {}
    for check in script.all_checks:
        if check.waits or check.name in _TIMING:
            continue
        params = check.params.model_dump(mode="json", exclude_unset=True)
        if check.name == "calls":
            params = {"tool": params["tool"]}
            check = bind("calls", params)
        keyed[check.name, json.dumps(params, sort_keys=True, ensure_ascii=False)] = check
    return keyed


@dataclass
class _Work:
    """What the attempts share."""

    teacher: Teacher
    persona: Persona
    checks: dict[str, tuple[BoundCheck, ...]]
    novelty: Novelty
    phrases: Phrases
    journal: Journal
    progress: Progress | None = None
    running: Counter[str] = field(default_factory=Counter)
    failures: int = 0

    def __post_init__(self) -> None:
        self._languages = [bind("language", {"expected": code}) for code in self.teacher.languages]

    def take(self, conversation: Conversation) -> None:
        """Enter an accepted conversation's turns and replies."""
        self.novelty.take(conversation["id"], user_turns(conversation))
        self.phrases.take(m["content"] for m in conversation["messages"] if m["role"] == "assistant")

    def faults_of_text(self, text: str) -> list[tuple[str, str]]:
        """What is wrong with a spoken text beyond the checks, as (name, detail)."""
        found = [("language", detail)] if (detail := self.other_language(text)) else []
        if (times := self.phrases.alike(text)) >= self.teacher.alike:
            found.append(("one phrase", f"{times} earlier replies say nearly this; say it in other words"))
        return found

    def other_language(self, text: str) -> str:
        """That a text is in none of the languages asked for; empty where it is, or none was asked for."""
        results = [check(Reply([{"role": "assistant", "content": text}])) for check in self._languages]
        return "" if not results or any(result.passed for result in results) else results[0].detail

    def next_brief(self, briefs: Sequence[Brief]) -> Brief | None:
        """The brief that is furthest behind its count and may still be tried."""
        journal = self.journal
        behind: Brief | None = None
        least = 1.0
        for brief in briefs:
            running = self.running[brief.name]
            share = (len(journal.accepted[brief.name]) + running) / brief.count
            tries_left = self.teacher.attempts * brief.count - journal.attempts[brief.name] - running
            if share < least and tries_left > 0:
                behind, least = brief, share
        return behind


def generate_with_teacher(
    teacher: Teacher,
    persona: Persona,
    suite: Suite,
    out: Path,
    briefs: Sequence[Brief],
    *,
    progress: Progress | None = None,
) -> TeacherReport:
    """Make conversations until every brief has its count; continues what an earlier call has left.

    Args:
        teacher: The settings.
        persona: Whose conversations they are.
        suite: Its checks judge the replies, and its cases may not be repeated.
        out: The JSONL file; `<stem>.log.jsonl` beside it holds one line for every attempt.
        briefs: What is wanted.
        progress: Told the number of accepted conversations.

    Returns:
        What was made over all calls; `complete` is False where attempts or a limit ended it early.

    Raises:
        UserError: The teacher cannot be used, or the file was begun with something else. Accepted conversations stay.
    """
    asked = {
        "persona": _digest(persona.system_prompt, persona.tools),
        "suite": suite.sha256,
        "model": teacher.model,
        "seed": teacher.seed,
        "sampling": [teacher.temperature, teacher.top_p, teacher.max_tokens],
        "briefs": {brief.name: _digest(brief.category, brief.about, brief.lesson) for brief in briefs},
    }
    with Journal(out, asked) as journal:
        work = _Work(teacher, persona, checks_of(suite), Novelty(), Phrases(), journal, progress)
        work.novelty.take_cases(case.model_dump() for case in suite.cases)
        for made in journal.conversations:
            work.take(made)
        stopped = asyncio.run(_fill(work, briefs))
        return TeacherReport(
            wanted={brief.name: brief.count for brief in briefs},
            made={brief.name: len(journal.accepted[brief.name]) for brief in briefs},
            attempts=sum(journal.attempts.values()),
            rejected=dict(journal.outcomes.most_common()),
            spent=journal.spent,
            cost=journal.spent.cost(teacher),
            stopped=stopped,
        )


def _digest(*values: object) -> str:
    return blake2b(repr(values).encode(), digest_size=16).hexdigest()


async def _fill(work: _Work, briefs: Sequence[Brief]) -> str | None:
    """Keep `concurrency` attempts under way; the limit that stopped them, if one did."""
    stopped: str | None = None
    running: set[asyncio.Task[None]] = set()
    numbers = Counter(work.journal.attempts)
    spent = Spent()
    spent.add(work.journal.spent)
    async with TeacherClient(work.teacher, spent) as client:
        try:
            while True:
                while stopped is None and len(running) < work.teacher.concurrency:
                    brief = work.next_brief(briefs)
                    if brief is None:
                        break
                    number, numbers[brief.name] = numbers[brief.name], numbers[brief.name] + 1
                    work.running[brief.name] += 1
                    running.add(asyncio.create_task(_attempt(work, client, brief, number)))
                if not running:
                    return stopped
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    try:
                        task.result()
                    except LimitReached as limit:
                        stopped = str(limit)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def _attempt(work: _Work, client: TeacherClient, brief: Brief, number: int) -> None:
    """One conversation, kept or logged with the reason why not."""
    attempt = Attempt(brief.name, number, "accepted")
    try:
        conversation = await _conversation(work, client, brief, attempt)
        _require_new(work, brief, user_turns(conversation))
        work.take(conversation)
        work.failures = 0
        work.journal.accept(attempt, conversation)
        if work.progress is not None:
            work.progress.update(len(work.journal.conversations), f"{work.journal.outcomes.total()} rejected")
    except Rejected as rejected:
        attempt.outcome, attempt.detail = rejected.reason, rejected.detail
        work.failures = 0
        work.journal.reject(attempt)
    except BadAnswer as bad:
        attempt.outcome, attempt.detail = f"answer: {str(bad).partition(':')[0]}", str(bad)[:500]
        work.failures += 1
        work.journal.reject(attempt)
        if work.failures >= MOST_FAILURES:
            raise UserError(
                f"{work.failures} conversations in a row got no readable answer from the teacher.",
                where=client.url,
                value=str(bad)[:500],
                remedy="look at the server; repeat the command to go on: what was accepted is kept",
            ) from bad
    except BaseException:  # a limit, a fault of the input, an interruption: what was spent is counted all the same
        if attempt.spent.requests:
            attempt.outcome = "unfinished"
            work.journal.reject(attempt)
        raise
    finally:
        work.running[brief.name] -= 1


async def _conversation(work: _Work, client: TeacherClient, brief: Brief, attempt: Attempt) -> Conversation:
    asked = 0

    async def ask(messages: Sequence[Message], tools: Sequence[Tool]) -> Message:
        nonlocal asked
        asked += 1
        seed = _seed(work.teacher.seed, brief.name, attempt.number, asked)
        message = await client.ask(messages, tools, seed, attempt.spent)
        return {**message, "content": spoken(message["content"])} if message["content"] else message

    made = [each for each in work.journal.conversations if each["category"] == brief.category]
    avoid = [turn for each in made[-_SHOWN_TURNS:] for turn in user_turns(each)[:1]]
    scenario = await invent(
        ask,
        work.persona,
        brief.category,
        brief.about,
        rng=Random(_seed(work.teacher.seed, brief.name, attempt.number, 0)),
        lesson=brief.lesson,
        avoid=avoid,
    )
    # Before anything is spent on replies; once more afterwards, as others were accepted meanwhile.
    _require_new(work, brief, scenario.turns)
    checks = work.checks.get(brief.category, work.checks[""])
    messages = await play(ask, work.persona, scenario, checks, work.teacher.revisions, work.faults_of_text)
    return record(identity(brief.name, attempt.number), brief.category, work.persona, messages)


def _require_new(work: _Work, brief: Brief, turns: Sequence[str]) -> None:
    if foreign := [found for turn in turns if (found := work.other_language(turn))]:
        raise Rejected("language", f"the user: {foreign[0]}")
    known = work.novelty.nearest(turns)
    if known is not None:
        reason = "leak" if known.source.startswith("case ") else "repeats"
        raise Rejected(reason, f"{known.similarity:.2f} to {known.source}: {known.turn!r}")
    if reused := sorted({word.casefold() for turn in turns for word in words_of(turn)} & brief.forbidden):
        raise Rejected("reuses the case", ", ".join(reused))


def _seed(*parts: object) -> int:
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest()) >> 1
