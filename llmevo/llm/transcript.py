"""Every call of a run on disk, so that none is paid for twice and the run can be played again.

::

    RUN/llm/000042.json   one call: what was asked, each request on the wire, the answer, what it cost
    RUN/llm/modes.json    how the endpoint was found to enforce a schema

A call's file is written before each of its requests is sent, and again when the answer is there. So a process
that is killed leaves the money it may have spent on record.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol, final

from llmevo import errors
from llmevo.errors import LLMError, StoreError
from llmevo.llm import DescribedClient, Reply, Request, Usage
from llmevo.llm.ledger import Ledger, Price, Row, Totals, total
from llmevo.rundir import redact, write_atomic
from llmevo.trial import Trial

FOLDER = "llm"
MODES = "modes.json"
_VERSION = 1


class Recorder(DescribedClient, Protocol):
    """A client that is told where in the search a call belongs."""

    def asking(self, trials: int) -> None:
        """What is asked from now on is asked with so many trials known."""
        ...

    def decided(self, trials: Sequence[Trial]) -> None:
        """These trials came of what was asked, and are in the store."""
        ...

    def rejected(self) -> None:
        """What was answered could not be used, and whoever goes on wants other answers."""
        ...


@final
class Transcript:
    """A client that writes down what another one is asked and answers.

    A call that an earlier sitting recorded, with the same request at the same place of the search, is
    answered from the record.

    Args:
        client: Who is asked.
        folder: `RUN/llm`.
        ledger: Counts the requests; is given those of earlier sittings. Pass the client the same one if it
            counts its own requests (`metered`).
        variable: Environment variable whose value is never written.
        max_tokens: The client's longest reply, for requests that do not say.

    Raises:
        StoreError: A record cannot be read.
    """

    def __init__(
        self,
        client: DescribedClient,
        folder: Path,
        ledger: Ledger,
        *,
        variable: str = "",
        max_tokens: int = 0,
    ) -> None:
        self.client = client
        self._folder = folder
        self._ledger = ledger
        self._variable = variable
        self._max_tokens = max_tokens
        self._trials = 0
        self._asked: list[int] = []
        self._next = 0
        self._answers: dict[tuple[int, str], deque[Mapping[str, Any]]] = defaultdict(deque)
        for record in read(folder):
            self._next = record["call"] + 1
            ledger.restore(Row.from_json(row) for row in record["attempts"])
            if record["state"] == "done":
                self._answers[record["trials"], record["key"]].append(record)

    @property
    def small(self) -> bool:
        """Whether the model is known to have under 1B parameters."""
        return self.client.small

    @property
    def totals(self) -> Totals:
        """What the run has spent so far."""
        return self._ledger.totals

    def describe(self) -> str:
        """One line: which model, where, and why this one."""
        return self.client.describe()

    def asking(self, trials: int) -> None:
        """What is asked from now on is asked with so many trials known."""
        self._trials = trials
        self._asked = []

    def complete(self, request: Request) -> Reply:
        """The recorded answer, or the client's.

        Raises:
            LLMError: As the client raises, and LLMBudgetError if a limit leaves no room for a request.
            StoreError: The disk does not serve.
        """
        client = _identity(self.client)
        key = _digest({"request": canonical(request), "client": {**client, "host": None}})
        known = self._answers[self._trials, key]
        if known:
            record = known.popleft()
            self._asked.append(record["call"])
            return _reply(record)
        number, self._next = self._next, self._next + 1
        self._asked.append(number)
        record = {
            "version": _VERSION,
            "call": number,
            "key": key,
            "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "trials": self._trials,
            "state": "open",
            "client": client,
            "request": canonical(request),
        }
        self._ledger.open_call(lambda rows: self._write({**record, "attempts": _json(rows)}))
        try:
            reply = self._metered(request)
        except LLMError as error:
            said = {"class": type(error).__name__, "message": str(error)}
            rows = _json(self._ledger.call_rows())
            self._write({**record, "state": "failed", "attempts": rows, "error": said})
            raise
        rows = _json(self._ledger.call_rows())
        small = {**client, "small": self.client.small}
        self._write({**record, "state": "done", "client": small, "attempts": rows, "reply": _answer(reply)})
        return reply

    def _metered(self, request: Request) -> Reply:
        """Ask the client; count for it if it does not count itself."""
        if getattr(self.client, "metered", False):
            return self.client.complete(request)
        self._ledger.reserve(request, request.max_tokens or self._max_tokens)
        reply = self.client.complete(request)
        for attempt in reply.attempts[-1:]:
            self._ledger.settle(attempt, reply.usage)
        return reply

    def decided(self, trials: Sequence[Trial]) -> None:
        """Add to the calls since `asking` which trials came of them."""
        made = [trial for trial in trials if trial.attrs.get("guest", True)]
        for number in self._asked:
            record = _load(self._path(number))
            record["decision"] = [
                {
                    "trial": trial.number,
                    "origin": trial.origin,
                    "counts": trial.attrs.get("llm", {}).get("counts", {}),
                }
                for trial in made
            ]
            self._write(record)
        self._asked = []

    def rejected(self) -> None:
        """What was answered since `asking` could not be used: it is kept, but it is not served again."""
        for number in self._asked:
            record = _load(self._path(number))
            if record["state"] == "done":
                self._write({**record, "state": "rejected"})
        self._asked = []

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.json"

    def _write(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record, indent=1) + "\n"
        write_atomic(self._path(record["call"]), redact(text, self._variable))


@final
class ReplayChat:
    """Answers from a run's records, and from nothing else.

    Args:
        folder: `RUN/llm`.

    Raises:
        StoreError: A record cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.small = False
        self._trials = 0
        self._done: dict[tuple[int, str], deque[Mapping[str, Any]]] = defaultdict(deque)
        self._failed: dict[tuple[int, str], Mapping[str, Any]] = {}
        for record in read(folder):
            place = record["trials"], _digest(record["request"])
            if record["state"] == "done":
                self.small = bool(record["client"]["small"])
                self._done[place].append(record)
            elif record["state"] == "failed":
                self._failed[place] = record

    def describe(self) -> str:
        """One line."""
        return "recorded answers"

    def asking(self, trials: int) -> None:
        """What is asked from now on is asked with so many trials known."""
        self._trials = trials

    def decided(self, trials: Sequence[Trial]) -> None:
        """Nothing is written."""

    def rejected(self) -> None:
        """Nothing is written."""

    def complete(self, request: Request) -> Reply:
        """The recorded answer.

        Raises:
            LLMError: There is none, or the call had failed with this error and was not repeated.
        """
        place = self._trials, _digest(canonical(request))
        if self._done[place]:
            return _reply(self._done[place].popleft())
        failed = self._failed.get(place)
        if failed is None:
            raise LLMError(
                f"the transcript must hold the call `{request.name}` made with {self._trials} trials known, "
                "but does not; it is of another run, or of another version of llmevo or of its prompts."
            )
        kind = getattr(errors, failed["error"]["class"], LLMError)
        raise kind(failed["error"]["message"])


def canonical(request: Request) -> dict[str, Any]:
    """A request as JSON: equal requests give equal text."""
    data = {
        "messages": [dict(message) for message in request.messages],
        "schema": request.schema,
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
        "name": request.name,
    }
    return data if request.mode is None else {**data, "mode": request.mode}


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The records in a folder, by number; none if it is not there.

    Raises:
        StoreError: One cannot be read.
    """
    for path in sorted(folder.glob("[0-9]*.json")):
        yield _load(path)


def spent(folder: Path, price: Price | None = None) -> Totals:
    """What the records in a folder add up to.

    Args:
        folder: `RUN/llm`.
        price: For calls that were made while none was known.

    Raises:
        StoreError: A record cannot be read.
    """
    rows: list[Row] = []
    calls = 0
    for record in read(folder):
        rows += [Row.from_json(row) for row in record["attempts"]]
        calls += 1
    return total(rows, calls, price)


def _load(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["version"] != _VERSION:
            raise StoreError(f"`{path}` was written by a newer llmevo; upgrade llmevo.")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"`{path}` cannot be read ({error!r}); restore it from a copy.") from error
    return record


def _identity(client: DescribedClient) -> dict[str, Any]:
    """Which model answers, by what it says of itself."""
    known: dict[str, Any] = getattr(client, "identity", None) or {"model": repr(client)}
    return known


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [row.to_json() for row in rows]


def _answer(reply: Reply) -> dict[str, Any]:
    names = [field.name for field in fields(Reply) if field.name != "attempts"]
    return {**{name: getattr(reply, name) for name in names}, "usage": asdict(reply.usage)}


def _reply(record: Mapping[str, Any]) -> Reply:
    data = dict(record["reply"])
    attempts = tuple(Row.from_json(row).attempt for row in record["attempts"])
    return Reply(**{**data, "usage": Usage(**data["usage"]), "attempts": attempts})
