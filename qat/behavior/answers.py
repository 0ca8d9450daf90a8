"""Reading a server's answer: whole as JSON or as a stream of events, and refusing what is no chat completion.

What a model may do wrong (say nothing, write broken tool arguments) passes through: checks judge it. What a server may
do wrong becomes `BadAnswer`, whose text begins with the kind of fault.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

MAX_ANSWER_BYTES = 16 << 20
"""A longer answer is not read to its end: no reply of this size is one."""


DEEPEST_CALLS = 100
"""Levels of lists and objects in `tool_calls`, where arguments are objects; twice as many spoil a result file."""


class BadAnswer(Exception):
    """The server answered, and the answer cannot be read; the text is `kind: details`."""


class AnsweredBy(NamedTuple):
    """One assistant message as recorded, and what it cost.

    Attributes:
        message: `role`, `content`, `finish_reason`, and where the model wrote them `tool_calls`, `reasoning_content`;
            `token_ids` where the server was asked for them.
        completion_tokens: As the server counts them; 0 where it does not say.
        seconds: From sending the request to the end of the answer, of the try that succeeded.
        first_token_s: To the first text, call or thought; None where the answer was not streamed.
    """

    message: dict[str, Any]
    completion_tokens: int
    seconds: float = 0.0
    first_token_s: float | None = None


def read_answer(content: bytes) -> tuple[dict[str, Any], int]:
    """Message and completion tokens of a whole answer.

    Raises:
        BadAnswer: Not UTF-8, not JSON, or no chat completion.
    """
    body = load_json(content)
    try:
        choice = body["choices"][0]
        message = choice["message"]
        produced = {**message, "finish_reason": choice.get("finish_reason"), "token_ids": choice.get("token_ids")}
        tokens = (body.get("usage") or {}).get("completion_tokens")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BadAnswer(f"no chat completion: {_shown(content)}") from None
    return checked_message(produced), tokens if type(tokens) is int else 0


def load_json(content: bytes) -> Any:
    """JSON of bytes that must be UTF-8 and hold no half characters.

    Raises:
        BadAnswer: They do not, or are no JSON.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise BadAnswer(f"not UTF-8: byte {error.start} of {len(content)}: {_shown(content)}") from None
    try:
        body = json.loads(text)
        # "\ud800" is JSON and no Unicode text: it could be neither judged nor written down.
        if "\\ud" in text or "\\uD" in text:
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadAnswer(f"not Unicode: half of a surrogate pair: {_shown(content)}") from None
    except (ValueError, RecursionError):
        raise BadAnswer(f"not JSON: {_shown(content)}") from None
    return body


def checked_message(message: dict[str, Any]) -> dict[str, Any]:
    """The message as recorded.

    Raises:
        BadAnswer: It is not of the form of an assistant message, so that no check could read it.
    """
    content, calls = message.get("content"), message.get("tool_calls") or []
    if content is not None and not isinstance(content, str):
        raise BadAnswer(f"no chat completion: the content is {_kind(content)}")
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        raise BadAnswer("no chat completion: tool_calls is no list of function calls")
    if _levels(calls, DEEPEST_CALLS + 1) > DEEPEST_CALLS:
        raise BadAnswer(f"no chat completion: tool_calls are nested more than {DEEPEST_CALLS} deep")
    thinking = message.get("reasoning_content") or message.get("reasoning")
    if thinking is not None and not isinstance(thinking, str):
        raise BadAnswer(f"no chat completion: the reasoning is {_kind(thinking)}")
    produced: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        produced["tool_calls"] = calls
    if thinking:
        produced["reasoning_content"] = thinking
    produced["finish_reason"] = message.get("finish_reason")
    if tokens := message.get("token_ids"):
        produced["token_ids"] = tokens
    return produced


def _is_call(call: object) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), str | dict | None)
    )


def _levels(value: object, most: int) -> int:
    """How deep lists and objects lie within each other, counted to `most`."""
    level, count = [value], 0
    while count < most and (level := [one for one in level if isinstance(one, list | dict)]):
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
        count += 1
    return count


class StreamedAnswer:
    """Puts an answer together from the events of a stream (`data: {…}` lines, `data: [DONE]` at the end)."""

    def __init__(self) -> None:
        self.begun = False
        """A text, call or thought has come."""
        self.done = False
        self._rest = b""
        self._texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
        self._calls: dict[int, dict[str, Any]] = {}
        self._finish: str | None = None
        self._tokens = 0
        self._token_ids: list[int] = []

    def feed(self, chunk: bytes) -> None:
        """Take over what has arrived; lines may be torn anywhere.

        Raises:
            BadAnswer: An event is no part of a chat completion.
        """
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip())

    def _event(self, content: bytes) -> None:
        if content == b"[DONE]":
            self.done = True
            return
        body = load_json(content)
        try:
            if body.get("error"):
                raise BadAnswer(f"error in the stream: {_shown(content)}")
            if usage := body.get("usage"):
                self._tokens = int(usage.get("completion_tokens") or 0)
            for choice in body.get("choices") or ():
                self._finish = choice.get("finish_reason") or self._finish
                self._token_ids += choice.get("token_ids") or ()
                self._delta(choice.get("delta") or {})
        except (KeyError, TypeError, AttributeError, ValueError):
            raise BadAnswer(f"no chat completion: {_shown(content)}") from None

    def _delta(self, delta: dict[str, Any]) -> None:
        for key, text in (
            ("content", delta.get("content")),
            ("reasoning_content", delta.get("reasoning_content") or delta.get("reasoning")),
        ):
            if text:
                self._texts[key].append(text)
                self.begun = True
        for part in delta.get("tool_calls") or ():
            self.begun = True
            call = self._calls.setdefault(
                part["index"], {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
            )
            call["id"] = part.get("id") or call["id"]
            function = part.get("function") or {}
            call["function"]["name"] = function.get("name") or call["function"]["name"]
            call["function"]["arguments"] += function.get("arguments") or ""

    def result(self) -> tuple[dict[str, Any], int] | None:
        """Message and completion tokens; None where the stream ended before the answer did.

        Raises:
            BadAnswer: The message is not of the form of an assistant message.
        """
        if not self.done and self._finish is None:
            return None
        try:
            texts = {key: "".join(parts) or None for key, parts in self._texts.items()}
        except TypeError:
            raise BadAnswer("no chat completion: a piece of the text is no text") from None
        calls = [self._calls[index] for index in sorted(self._calls)]
        message = {**texts, "tool_calls": calls, "finish_reason": self._finish, "token_ids": self._token_ids}
        return checked_message(message), self._tokens


def _shown(content: bytes) -> str:
    return content[:200].decode(errors="replace")


def _kind(value: object) -> str:
    return {list: "a list", dict: "a mapping", bool: "true or false"}.get(type(value), "a number")
