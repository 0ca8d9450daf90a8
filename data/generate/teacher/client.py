"""Requests to a teacher: keyed, spaced, counted against limits, retried where the transport failed.

What the answer says is read by the same code as the behaviour suite's (`qat.behavior.answers`). A timeout is not tried
again: the server still works at the question.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

import httpx

from qat.behavior.answers import MAX_ANSWER_BYTES, BadAnswer, load_json, read_answer
from qat.data.generate.teacher.settings import Teacher
from qat.errors import UserError

PAUSES_S = (0.5, 2.0, 8.0, 20.0)
"""Pauses before the next try where the server does not name one (`Retry-After`)."""
LONGEST_PAUSE_S = 120.0
_FATAL = (401, 403, 404, 405)
_BUSY = (408, 409, 429)


@dataclass
class Spent:
    """What was used so far.

    Attributes:
        requests: That were answered.
        prompt_tokens: As the server counts them.
        completion_tokens: As the server counts them.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens

    def add(self, other: Spent) -> None:
        """Count another's on top."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens

    def cost(self, teacher: Teacher) -> float | None:
        """By the teacher's price; None where it states none."""
        price = teacher.price
        return (
            None
            if price is None
            else (self.prompt_tokens * price.input + self.completion_tokens * price.output) / 1_000_000
        )


class LimitReached(Exception):
    """A limit of the settings; the text says which."""


class TeacherClient:
    """`POST <url>/v1/chat/completions` for one teacher.

    Args:
        teacher: The settings.
        spent: What earlier calls have used; counted on.
    """

    def __init__(self, teacher: Teacher, spent: Spent) -> None:
        self.teacher = teacher
        self.spent = spent
        self.url = f"{teacher.url}/v1/chat/completions"
        self._key = teacher.key()
        self._turnstile = asyncio.Lock()
        self._next_start = 0.0

    async def __aenter__(self) -> Self:
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=self.teacher.concurrency)
        timeout = httpx.Timeout(self.teacher.timeout_s, connect=min(10.0, self.teacher.timeout_s))
        self._http = httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def ask(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], seed: int, used: Spent
    ) -> dict[str, Any]:
        """One answer.

        Args:
            messages: In OpenAI's form.
            tools: OpenAI function tools; empty offers none.
            seed: Of the sampling.
            used: Counted on: what this one conversation takes.

        Returns:
            The assistant message, as `qat.behavior.answers.read_answer` gives it.

        Raises:
            BadAnswer: No answer that can be read; the text is `kind: details`.
            LimitReached: Nothing was sent.
            UserError: Nobody listens, the key or address is refused, or the server counts no tokens although a limit
                needs them.
        """
        teacher = self.teacher
        body: dict[str, Any] = {
            "model": teacher.model,
            "messages": list(messages),
            "temperature": teacher.temperature,
            "top_p": teacher.top_p,
            "seed": seed,
            teacher.length_key: teacher.max_tokens,
            **teacher.extra,
        }
        if tools:
            body |= {"tools": list(tools), "tool_choice": "auto"}
        answer = await self._try_hard(json.dumps(body, ensure_ascii=False).encode())
        taken = Spent(requests=1)
        try:
            self._count(answer, taken)
        finally:
            self.spent.add(taken)
            used.add(taken)
        return read_answer(answer)[0]

    async def _try_hard(self, content: bytes) -> bytes:
        fault: Exception = BadAnswer("")
        for pause in (*PAUSES_S, None):
            await self._pass()
            try:
                async with asyncio.timeout(self.teacher.timeout_s):
                    return await self._once(content)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                fault = UserError(
                    "The teacher does not answer.",
                    where=self.url,
                    value=f"{_said(error)} (after {len(PAUSES_S) + 1} tries)",
                    remedy="is it running? Repeat the command: what was accepted so far is kept",
                )
            except (httpx.TimeoutException, TimeoutError):
                raise BadAnswer(f"timeout: no whole answer for {self.teacher.timeout_s:g} s") from None
            except httpx.TransportError as error:
                fault = BadAnswer(f"connection: {_said(error)}")
            except _Busy as busy:
                fault = BadAnswer(str(busy))
                pause = None if pause is None else busy.pause or pause
            if pause is not None:
                await asyncio.sleep(pause)
        raise fault

    async def _pass(self) -> None:
        """Wait for this request's place in the minute; refuse it where a limit is reached."""
        if self.teacher.requests_per_minute is not None:
            async with self._turnstile:
                await asyncio.sleep(max(0.0, self._next_start - time.monotonic()))
                self._next_start = time.monotonic() + 60.0 / self.teacher.requests_per_minute
        limits, cost = self.teacher.limits, self.spent.cost(self.teacher)
        for name, used, limit in (
            ("requests", self.spent.requests, limits.requests),
            ("tokens", self.spent.tokens, limits.tokens),
            ("cost", cost or 0.0, limits.cost),
        ):
            if limit is not None and used >= limit:
                raise LimitReached(f"limits.{name} = {limit:g} is used up")

    async def _once(self, content: bytes) -> bytes:
        request = self._http.stream(
            "POST", self.url, content=content, headers={"content-type": "application/json"}, follow_redirects=False
        )
        async with request as response:
            parts, size = [], 0
            async for part in response.aiter_bytes():
                size += len(part)
                if size > MAX_ANSWER_BYTES:
                    raise BadAnswer(f"too large: more than {MAX_ANSWER_BYTES >> 20} MiB")
                parts.append(part)
            body = b"".join(parts)
            if not response.is_success:
                self._refuse(response, body)
            return body

    def _refuse(self, response: httpx.Response, body: bytes) -> None:
        words = body[:500].decode(errors="replace")
        if self._key:
            words = words.replace(self._key, "…")
        reason = f"HTTP {response.status_code}: {words}"
        if response.status_code in _FATAL:
            raise UserError(
                "The teacher refuses every request of this kind.",
                where=self.url,
                value=reason,
                remedy="check url, model and the key in the environment",
            )
        if response.status_code >= 500 or response.status_code in _BUSY:
            raise _Busy(reason, _seconds(response.headers.get("retry-after")))
        raise BadAnswer(reason)

    def _count(self, answer: bytes, taken: Spent) -> None:
        body = load_json(answer)
        usage = body.get("usage") if isinstance(body, dict) else None
        usage = usage if isinstance(usage, dict) else {}
        counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
        limits = self.teacher.limits
        if not all(type(count) is int for count in counts) and (limits.tokens or limits.cost):
            raise UserError(
                "The teacher does not say how many tokens it used, so its limits cannot be kept.",
                where=self.url,
                value=usage or None,
                remedy="limit the requests instead (limits.requests)",
            )
        taken.prompt_tokens, taken.completion_tokens = (count if type(count) is int else 0 for count in counts)


class _Busy(Exception):
    """The server cannot answer now; `pause` is what it asks to wait, in seconds."""

    def __init__(self, reason: str, pause: float | None) -> None:
        self.pause = pause
        super().__init__(reason)


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` (seconds, or an HTTP date) in seconds, at most two minutes; None where it is absent or neither."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(retry_after or "") - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(LONGEST_PAUSE_S, max(0.0, seconds))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
