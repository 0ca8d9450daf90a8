"""A chat client for one server: keep-alive connections, retries on transport errors, 5xx and "busy" (408, 429) only."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from qat.errors import UserError

PAUSES_S = (0.25, 1.0, 3.0)
"""Pauses before the second, third and fourth try."""
CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 300.0
"""The longest silence of a server that is still taken for work; a CPU with a full batch needs tens of seconds."""
_TIMEOUT = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S).as_dict()
_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1)
_FATAL = (401, 403, 404, 405)


class Refused(Exception):
    """The server does not take this conversation (HTTP 4xx); the text says why in its own words."""


class AnsweredBy(NamedTuple):
    """One assistant message as recorded, and what it cost."""

    message: dict[str, Any]
    completion_tokens: int


class ChatClient:
    """`POST <url>/v1/chat/completions` for one model.

    Args:
        url: Root of the server, with or without `/v1`.
        model: Name of the model there.
        max_tokens: Longest answer.
        concurrency: Connections kept open; at most so many `chat` calls may be under way.
    """

    def __init__(self, url: str, model: str, max_tokens: int, concurrency: int) -> None:
        root = url.rstrip("/").removesuffix("/v1")
        if not root.startswith(("http://", "https://")):
            raise UserError(
                "The URL of the server is no HTTP address.", value=url, remedy="give it as http://host:port"
            )
        self.url = f"{root}/v1/chat/completions"
        self.model = model
        self.max_tokens = max_tokens
        self.requests = 0
        self._connections = concurrency
        self._idle: list[httpx.AsyncHTTPTransport] = []

    async def __aenter__(self) -> Self:
        # One transport of one connection for each worker: httpx looks over every connection of a pool at every request,
        # which at 16 connections costs more than the request itself. Transports are used directly, without httpx's
        # client: redirects, cookies and a proxy of the environment have no place between the runner and its server.
        context = httpx.create_ssl_context()
        self._idle = [httpx.AsyncHTTPTransport(verify=context, limits=_ONE) for _ in range(self._connections)]
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
            Refused: HTTP 4xx that concerns this conversation.
            UserError: No answer after all tries, an answer that is no chat completion, or HTTP 4xx that concerns every
            request.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "max_tokens": self.max_tokens,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        if tools:
            body |= {"tools": tools, "tool_choice": "auto"}
        return self._read(await self._post(json.dumps(body, ensure_ascii=False).encode()))

    async def _post(self, content: bytes) -> bytes:
        # The last one used is the first one taken: its connection is surely open.
        connection = self._idle.pop()
        try:
            return await self._try_hard(connection, content)
        finally:
            self._idle.append(connection)

    def _request(self, content: bytes) -> httpx.Request:
        headers = {"content-type": "application/json", "accept": "application/json"}
        return httpx.Request("POST", self.url, headers=headers, content=content, extensions={"timeout": _TIMEOUT})

    async def _try_hard(self, connection: httpx.AsyncHTTPTransport, content: bytes) -> bytes:
        reason = ""
        for pause in (*PAUSES_S, None):
            self.requests += 1
            try:
                response = await connection.handle_async_request(self._request(content))
                body = await response.aread()
                await response.aclose()
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
            else:
                if response.status_code < 400:
                    return body
                reason = f"HTTP {response.status_code}: {_server_words(response)}"
                if response.status_code in _FATAL:
                    raise UserError(
                        "The server refuses every request of this kind.",
                        where=self.url,
                        value=reason,
                        remedy="check URL and model name",
                    )
                if response.status_code < 500 and response.status_code not in (408, 429):
                    raise Refused(reason)
            if pause is not None:
                await asyncio.sleep(pause)
        raise UserError(
            "The server does not answer.",
            where=self.url,
            value=f"{reason} (after {len(PAUSES_S) + 1} tries)",
            remedy="see the server's log, start it again and repeat the command: answers so far are kept",
        )

    def _read(self, content: bytes) -> AnsweredBy:
        try:
            body = json.loads(content)
            choice = body["choices"][0]
            message = choice["message"]
            usage = body.get("usage") or {}
            produced: dict[str, Any] = {"role": "assistant", "content": message.get("content")}
            if message.get("tool_calls"):
                produced["tool_calls"] = message["tool_calls"]
            if thinking := message.get("reasoning_content") or message.get("reasoning"):
                produced["reasoning_content"] = thinking
            produced["finish_reason"] = choice.get("finish_reason")
            return AnsweredBy(produced, int(usage.get("completion_tokens") or 0))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                "The server's answer is no chat completion.",
                where=self.url,
                value=content[:200].decode(errors="replace"),
            ) from error


def _server_words(response: httpx.Response) -> str:
    """The server's own message, of whichever of the usual forms."""
    try:
        body = response.json()
        error = body.get("error", body)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (ValueError, AttributeError):
        return response.text[:500]
