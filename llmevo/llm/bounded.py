"""An HTTP client whose answers end: in total seconds, and in bytes.

A read timeout bounds the wait for the next bytes, not for the last ones: a server that sends one byte a
second holds a caller for as long as it likes. And a body is read whole before anybody looks at it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import final

import httpx2
import openai

MOST_BYTES = 2_000_000  # a hundred long genomes with reasons are a tenth of it


@final
class _Bounded(httpx2.SyncByteStream):
    """A body that stops being read after `until` or at `most` bytes; what is cut off is not JSON any more."""

    def __init__(self, stream: httpx2.SyncByteStream, request: httpx2.Request, until: float) -> None:
        self._stream = stream
        self._request = request
        self._until = until

    def __iter__(self) -> Iterator[bytes]:
        left = MOST_BYTES
        for part in self._stream:
            yield part[:left]
            left -= len(part)
            if left <= 0:
                return
            if time.monotonic() > self._until:
                raise httpx2.ReadTimeout("the answer came too slowly", request=self._request)

    def close(self) -> None:
        self._stream.close()


def client() -> httpx2.Client:
    """The openai package's HTTP client, proxies included, with bounded bodies.

    A request's read timeout is taken as the time for the whole answer, error bodies included; past it the
    client raises `httpx2.ReadTimeout`. A body is cut at `MOST_BYTES`. Compression is not asked for, since a
    small compressed body may be a huge one.
    """
    return openai.DefaultHttpxClient(
        headers={"accept-encoding": "identity"}, event_hooks={"request": [_started], "response": [_bound]}
    )


def _started(request: httpx2.Request) -> None:
    request.extensions.setdefault("llmevo_started", time.monotonic())


def _bound(response: httpx2.Response) -> None:
    extensions = response.request.extensions
    seconds = (extensions.get("timeout") or {}).get("read")
    until = float("inf") if seconds is None else extensions["llmevo_started"] + seconds
    assert isinstance(response.stream, httpx2.SyncByteStream)
    response.stream = _Bounded(response.stream, response.request, until)
