"""A server that sends prepared bytes, for what no well-behaved server does; HTTP/1.1, one thread a connection."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Piece = bytes | float
"""Bytes to send, or seconds to wait."""
Prepared = Callable[[dict[str, Any], int], Sequence[Piece]]
"""(body, number of this request) -> what to send; the connection is closed where the last piece is b""."""


def whole(body: bytes, kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s" % (kind, len(body), body)


def message(content: Any, **more: Any) -> bytes:
    body = {"choices": [{"message": {"role": "assistant", "content": content} | more, "finish_reason": "stop"}]}
    return whole(json.dumps(body).encode())


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    body = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | more
    return chunk(b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n")


STREAM_END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


@contextmanager
def sending(prepared: Prepared) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of the server, and the bodies that it was sent; each carries the number of its `connection`, from 1."""
    bodies: list[dict[str, Any]] = []
    numbers = itertools.count(1)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        number = next(numbers)
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as file:
            while True:
                length = 0
                while (line := file.readline()) not in (b"\r\n", b""):
                    if line.lower().startswith(b"content-length"):
                        length = int(line.split(b":")[1])
                if not line:
                    return
                bodies.append(json.loads(file.read(length) or b"{}") | {"connection": number})
                pieces = prepared(bodies[-1], len(bodies) - 1)
                for piece in pieces:
                    if isinstance(piece, float):
                        time.sleep(piece)
                    else:
                        connection.sendall(piece)
                if not pieces or pieces[-1] == b"":
                    return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", bodies
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
