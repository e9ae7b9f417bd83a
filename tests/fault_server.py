"""A scripted OpenAI-compatible server on loopback: real HTTP, real faults.

A script is a list of steps, one for each request; the last one repeats. A step is a function of the request's
JSON that says what to send.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What goes over the wire for one request."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    reset: bool = False
    cut: int | None = None  # bytes of the body that are sent before the connection closes
    pace: float = 0.0  # seconds before each byte of the body
    repeat: int = 1  # how often the body is sent, one after the other


Step = Callable[[dict[str, Any]], Answer]


@dataclass
class Seen:
    """One request as the server got it."""

    path: str
    headers: dict[str, str]
    json: dict[str, Any]
    at: float


class FaultServer:
    """The server; `requests` lists what came in."""

    def __init__(self, script: list[Step]) -> None:
        self.script = script
        self.requests: list[Seen] = []
        self.sent = 0  # bytes of bodies that clients took
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.serve(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # clients that gave up are part of the script

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers["content-length"]))
        seen = Seen(handler.path, dict(handler.headers), json.loads(raw), time.monotonic())
        with self.lock:
            step = self.script[min(len(self.requests), len(self.script) - 1)]
            self.requests.append(seen)
        answer = step(seen.json)
        time.sleep(answer.delay)
        if answer.reset:
            # Zero linger makes close() send RST instead of FIN.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # The socket closes for good only when no file refers to it.
            handler.close_connection = True
            for part in (handler.rfile, handler.wfile, handler.connection):
                part.close()
            return
        with contextlib.suppress(ConnectionError):
            handler.send_response(answer.status)
            for name, value in {"content-type": "application/json", **answer.headers}.items():
                handler.send_header(name, value)
            handler.send_header("content-length", str(len(answer.body) * answer.repeat))
            handler.end_headers()
            for part in self.parts(answer):
                handler.wfile.write(part)
                self.sent += len(part)
            if answer.cut is not None:
                handler.wfile.flush()
                handler.close_connection = True

    @staticmethod
    def parts(answer: Answer) -> Iterator[bytes]:
        """The body as it goes over the wire."""
        body = answer.body[: answer.cut]
        if not answer.pace:
            yield from (body for _ in range(answer.repeat))
            return
        for place in range(len(body)):
            time.sleep(answer.pace)
            yield body[place : place + 1]


@contextlib.contextmanager
def serving(*script: Step) -> Iterator[FaultServer]:
    """Run a FaultServer with this script."""
    server = FaultServer(list(script))
    # Threads that still hang at the end are daemons: waiting for them would add their delay to the test.
    server.http.block_on_close = False
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        thread.join()
        server.http.server_close()


def completion(content: Any, finish: str = "stop", **changes: Any) -> bytes:
    """The body of a chat completion, in the shape that OpenAI documents."""
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "served-model",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
        ],
        "usage": {
            "prompt_tokens": 11,
            "completion_tokens": 7,
            "total_tokens": 18,
            "completion_tokens_details": {"reasoning_tokens": 2},
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }
    return json.dumps({**body, **changes}).encode()


def ok(content: Any, finish: str = "stop", **changes: Any) -> Step:
    """A 200 with this message."""
    return lambda request: Answer(body=completion(content, finish, **changes))


def raw(body: bytes, **options: Any) -> Step:
    """A 200 with this body."""
    return lambda request: Answer(body=body, **options)


def error(
    status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
) -> Step:
    """An error in OpenAI's shape."""
    body = json.dumps({"error": {"message": message, "type": "error", "param": None, "code": code}}).encode()
    return lambda request: Answer(status, body, headers or {})


def reset() -> Step:
    """The connection is reset before an answer."""
    return lambda request: Answer(reset=True)


def hang(seconds: float) -> Step:
    """No answer for so long."""
    return lambda request: Answer(body=completion("late"), delay=seconds)


def trickle(content: str, pace: float, status: int = 200) -> Step:
    """A body that comes byte by byte: each in time for a read timeout, the whole of it never."""
    return lambda request: Answer(status, completion(content), pace=pace)


def huge(megabytes: int) -> Step:
    """A reply of so many megabytes of opening brackets, the slowest thing there is for a JSON parser."""
    return lambda request: Answer(body=b"[{" * 500_000, repeat=megabytes)


def only(kind: str | None, status: int, message: str, content: str) -> Step:
    """Refuse every response format but one of this type (None: any), then answer."""

    def step(request: dict[str, Any]) -> Answer:
        given = request.get("response_format")
        accepted = given is None if kind is None else given is not None and given["type"] == kind
        return ok(content)(request) if accepted else error(status, message)(request)

    return step


def genomes(content: Callable[[int], dict[str, Any]]) -> Step:
    """Answer with as many genomes as the prompt's contract asks for, `content(index)` each."""
    served = iter(range(10**9))

    def step(request: dict[str, Any]) -> Answer:
        prompt = request["messages"][-1]["content"]
        count = int(re.findall(r"with (\d+) entries", prompt)[-1])
        proposals = [{"genome": content(next(served)), "why": "as scripted"} for _ in range(count)]
        return ok(json.dumps({"proposals": proposals}))(request)

    return step
