"""A chat client for one server: keep-alive connections, retries on transport errors, 5xx and "busy" (408, 429) only.

A timeout is not tried again: the server still works at the question, and asking twice only adds to its load.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from qat.behavior.answers import MAX_ANSWER_BYTES, AnsweredBy, BadAnswer, StreamedAnswer, load_json, read_answer
from qat.errors import UserError

PAUSES_S = (0.25, 1.0, 3.0)
"""Pauses before the second, third and fourth try."""
CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 300.0
"""The longest silence of a server that is still taken for work; a CPU with a full batch needs tens of seconds."""
DEADLINE_S = 1800.0
"""The longest that one answer may take, however steadily it drips."""
TEMPLATE_SETTINGS = {"enable_thinking": False}
"""What chat templates are told: replies without a written thought."""
_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1)
_FATAL = (401, 403, 404, 405)
T = TypeVar("T")
_Read = Callable[[httpx.Response, float], Awaitable[T]]
"""Reads an answer; given the time at which the request was sent."""


class ChatClient:
    """`POST <url>/v1/chat/completions` for one model.

    Args:
        url: Root of the server, with or without `/v1`.
        model: Name of the model there.
        max_tokens: Longest answer.
        concurrency: Connections kept open; at most so many `chat` calls may be under way.
        stream: Ask for the answers as streams, which alone shows the time to the first token.
        token_ids: Ask for the ids of the answers' tokens; vLLM gives them, and other servers may refuse the question.
    """

    def __init__(
        self,
        url: str,
        model: str,
        max_tokens: int,
        concurrency: int,
        stream: bool = False,
        token_ids: bool = False,
    ) -> None:
        root = url.rstrip("/").removesuffix("/v1")
        if not root.startswith(("http://", "https://")):
            raise UserError(
                "The URL of the server is no HTTP address.", value=url, remedy="give it as http://host:port"
            )
        self.root = root
        self.url = f"{root}/v1/chat/completions"
        self.model = model
        self.max_tokens = max_tokens
        self.stream = stream
        self.token_ids = token_ids
        self.requests = 0
        self._timeouts = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S).as_dict()
        self.connections = concurrency
        self._idle: list[httpx.AsyncHTTPTransport] = []

    async def __aenter__(self) -> Self:
        # One transport of one connection for each worker: httpx looks over every connection of a pool at every request,
        # which at 16 connections costs more than the request itself. Transports are used directly, without httpx's
        # client: redirects, cookies and a proxy of the environment have no place between the runner and its server.
        context = httpx.create_ssl_context()
        self._idle = [httpx.AsyncHTTPTransport(verify=context, limits=_ONE) for _ in range(self.connections)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._idle:
            await connection.aclose()
        self._idle = []

    async def chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], temperature: float, top_p: float, seed: int
    ) -> AnsweredBy:
        """One answer.

        Raises:
            BadAnswer: No answer to this conversation that could be judged: the server refuses it (HTTP 4xx), is silent
                too long, breaks off at every try, or sends what is no chat completion.
            UserError: Nobody listens at the address, or HTTP 4xx that concerns every request.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "max_tokens": self.max_tokens,
            "chat_template_kwargs": TEMPLATE_SETTINGS,
        }
        if tools:
            body |= {"tools": tools, "tool_choice": "auto"}
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.token_ids:
            body["return_token_ids"] = True
        request = self._request(self.url, body, self.stream)
        return await self._post(request, _read_stream if self.stream else _read_message)

    async def json(self, path: str, body: dict[str, Any]) -> Any:
        """What another address of the same server answers.

        Args:
            path: Below the server's root, as `/tokenize`.
            body: The question, jsonable; the model's name is added.

        Raises:
            BadAnswer: As `chat`; the answer is no JSON.
            UserError: As `chat`.
        """
        return await self._post(self._request(f"{self.root}{path}", {"model": self.model, **body}), _read_json)

    async def _post(self, request: httpx.Request, read: _Read[T]) -> T:
        # The last one used is the first one taken: its connection is surely open.
        connection = self._idle.pop()
        try:
            return await self._try_hard(connection, request, read)
        finally:
            self._idle.append(connection)

    def _request(self, url: str, body: dict[str, Any], stream: bool = False) -> httpx.Request:
        headers = {"content-type": "application/json", "accept": "text/event-stream" if stream else "application/json"}
        content = json.dumps(body, ensure_ascii=False).encode()
        return httpx.Request("POST", url, headers=headers, content=content, extensions={"timeout": self._timeouts})

    async def _try_hard(self, connection: httpx.AsyncHTTPTransport, request: httpx.Request, read: _Read[T]) -> T:
        fault: Exception = BadAnswer("")
        for pause in (*PAUSES_S, None):
            self.requests += 1
            try:
                async with asyncio.timeout(DEADLINE_S):
                    return await self._once(connection, request, read)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                fault = UserError(
                    "The server does not answer.",
                    where=str(request.url),
                    value=f"{_said(error)} (after {len(PAUSES_S) + 1} tries)",
                    remedy="see the server's log, start it again and repeat the command: answers so far are kept",
                )
            except (httpx.TimeoutException, TimeoutError) as error:
                limit = ANSWER_TIMEOUT_S if isinstance(error, httpx.TimeoutException) else DEADLINE_S
                raise BadAnswer(f"timeout: no answer for {limit:g} s") from None
            except httpx.TransportError as error:
                fault = BadAnswer(f"connection: {_said(error)}")
            except _Busy as busy:
                fault = BadAnswer(str(busy))
            if pause is not None:
                await asyncio.sleep(pause)
        raise fault

    async def _once(self, connection: httpx.AsyncHTTPTransport, request: httpx.Request, read: _Read[T]) -> T:
        """One try.

        Raises:
            httpx.TransportError: The connection or the stream broke off.
            _Busy: HTTP 5xx, 408 or 429: worth another try.
        """
        started = time.monotonic()
        response = await connection.handle_async_request(request)
        try:
            if response.status_code >= 400:
                await response.aread()
                _refuse(response, str(request.url))
            return await read(response, started)
        finally:
            await response.aclose()


async def in_parallel(worker: Callable[[], Coroutine[Any, Any, None]], count: int) -> None:
    """Run so many of one worker until all of them end.

    Raises:
        UserError: One raised it, which stops the others. Every worker meets a dead server: one message is enough.
            Anything else is a bug and keeps its traceback.
    """
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(worker())
    except BaseExceptionGroup as group:
        faults, others = group.split(UserError)
        if faults is None or others is not None:
            raise
        raise faults.exceptions[0] from None


class _Busy(Exception):
    """The server cannot answer now."""


def _refuse(response: httpx.Response, url: str) -> None:
    reason = f"HTTP {response.status_code}: {_server_words(response)}"
    if response.status_code in _FATAL:
        raise UserError(
            "The server refuses every request of this kind.",
            where=url,
            value=reason,
            remedy="check URL and model name",
        )
    raise _Busy(reason) if response.status_code >= 500 or response.status_code in (408, 429) else BadAnswer(reason)


async def _read_message(response: httpx.Response, started: float) -> AnsweredBy:
    message, tokens = read_answer(await _whole(response))
    return AnsweredBy(message, tokens, time.monotonic() - started)


async def _read_stream(response: httpx.Response, started: float) -> AnsweredBy:
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        return await _read_message(response, started)
    answer, first = StreamedAnswer(), None
    async for part in _limited(response):
        answer.feed(part)
        if first is None and answer.begun:
            first = time.monotonic() - started
    result = answer.result()
    if result is None:
        raise httpx.RemoteProtocolError("the stream ended before the answer did")
    return AnsweredBy(*result, time.monotonic() - started, first)


async def _read_json(response: httpx.Response, started: float) -> Any:
    return load_json(await _whole(response))


async def _whole(response: httpx.Response) -> bytes:
    return b"".join([part async for part in _limited(response)])


async def _limited(response: httpx.Response) -> AsyncIterator[bytes]:
    size = 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise BadAnswer(f"too large: more than {MAX_ANSWER_BYTES >> 20} MiB")
        yield part


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def first_model(url: str) -> str:
    """Name of the first model that a server offers.

    Raises:
        UserError: The server cannot be reached or does not say.
    """
    where = f"{url.rstrip('/').removesuffix('/v1')}/v1/models"
    try:
        answer = httpx.get(where, timeout=30.0)
        return str(answer.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise UserError(
            "The server does not say which models it offers.",
            where=where,
            value=str(error),
            remedy="is it running? --model (pytest: --qat-model) names its model",
        ) from error


def _server_words(response: httpx.Response) -> str:
    """The server's own message, of whichever of the usual forms."""
    try:
        body = response.json()
        error = body.get("error", body)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (ValueError, AttributeError):
        return response.text[:500]
