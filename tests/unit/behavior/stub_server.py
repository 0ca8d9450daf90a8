"""A stand-in for a model server: HTTP/1.1 with keep-alive on asyncio streams, answers by rule, counts what it is asked.

Run as a program it serves until its standard input closes; the port stands on its first line of output.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Answer = Callable[[dict[str, Any], int], tuple[int, dict[str, Any]] | None]
"""(body, number of this request) -> (status, JSON), or None: cut the connection without an answer."""


def completion(
    content: str | None, tool_calls: list[dict[str, Any]] | None = None, finish: str = "stop"
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if tool_calls:
        message["tool_calls"] = tool_calls
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": {"completion_tokens": 7}}


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": f"id_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}


class Stub:
    """Serves on a free port of this machine."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.connections = 0
        self.at_once = 0
        self.most_at_once = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                )
                body = json.loads(await reader.readexactly(length))
                number = len(self.bodies)
                self.bodies.append(body)
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                await asyncio.sleep(0)
                answer = self.answer(body, number)
                self.at_once -= 1
                if answer is None:
                    break
                status, content = answer
                text = json.dumps(content).encode()
                writer.write(
                    b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                    % (status, len(text))
                    + text
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server


@contextmanager
def serving(answer: Answer) -> Iterator[Stub]:
    """A stub in a thread of this process."""
    stub = Stub(answer)
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    stop: asyncio.Event = asyncio.Event()

    async def main() -> None:
        server = await stub.start()
        ready.set()
        await stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert ready.wait(5)
    try:
        yield stub
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(5)
        loop.close()


def by_rule(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
    """The answers of the program form: a call where a reminder is asked for, else a plain sentence."""
    last = body["messages"][-1]
    names = [tool["function"]["name"] for tool in body.get("tools", [])]
    if last["role"] == "user" and "remind" in last["content"].lower() and "set_reminder" in names:
        return 200, completion(None, [call("set_reminder", json.dumps({"text": "x", "time": "seven"}))], "tool_calls")
    return 200, completion("You live in Bengaluru, and your sister is Kavya.")


if __name__ == "__main__":

    async def _program() -> None:
        stub = Stub(by_rule)
        await stub.start()
        print(stub.port, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

    asyncio.run(_program())
