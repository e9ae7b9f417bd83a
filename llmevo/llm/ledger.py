"""What a language model costs: requests, tokens and dollars, and the limits that no request may pass.

A request is reserved before it is sent, at the most that it can cost, and settled when its answer is there.
One that may have been billed without an answer (a timeout, a reset, a server error) keeps its reservation:
a limit that counted only what was answered would not be one. What is unknown stays unknown: a sum with an
unknown term is None, never a number that looks like knowledge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar, final

from llmevo.errors import LLMBudgetError
from llmevo.llm import Attempt, Request, Usage

_PER = 1_000_000  # prices are in dollars for so many tokens
_UNKNOWN = Usage()
_OVERHEAD = 64  # tokens that a chat template may add to a message


@final
@dataclass(frozen=True, slots=True)
class Price:
    """Dollars for a million tokens.

    Args:
        prompt: For tokens read.
        completion: For tokens written, reasoning included.
        cached: For tokens read that the endpoint had already; None for the price of `prompt`.
    """

    prompt: float
    completion: float
    cached: float | None = None

    def usd(self, usage: Usage) -> float | None:
        """What a call cost; None if the endpoint does not say how many tokens it took."""
        if usage.prompt is None or usage.completion is None:
            return None
        cached = min(usage.cached or 0, usage.prompt)
        rate = self.prompt if self.cached is None else self.cached
        dear = (usage.prompt - cached) * self.prompt + usage.completion * self.completion
        return (dear + cached * rate) / _PER


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """What the whole run may spend; None for no limit.

    Args:
        max_calls: Requests sent, the failed ones included.
        max_total_tokens: Tokens read and written.
        max_usd: Dollars; needs a price.
    """

    max_calls: int | None = None
    max_total_tokens: int | None = None
    max_usd: float | None = None


@final
@dataclass(frozen=True, slots=True)
class Row:
    """One request on the wire, in the ledger.

    Args:
        attempt: What became of it; outcome `sent` while nothing is known.
        usage: Its tokens, as far as the endpoint said.
        usd: What it cost; None if unknown.
        held_tokens: The most that it can have taken, where that is all we know; else 0.
        held_usd: The same in dollars; None without a price.
    """

    attempt: Attempt
    usage: Usage = _UNKNOWN
    usd: float | None = None
    held_tokens: int = 0
    held_usd: float | None = 0.0

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` gives an equal Row back."""
        return {
            **asdict(self.attempt),
            "usage": asdict(self.usage),
            "usd": self.usd,
            "held_tokens": self.held_tokens,
            "held_usd": self.held_usd,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The Row that `to_json` wrote."""
        attempt = Attempt(**{field.name: data[field.name] for field in fields(Attempt)})
        return cls(attempt, Usage(**data["usage"]), data["usd"], data["held_tokens"], data["held_usd"])


@final
@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a run; None where a term is unknown.

    Args:
        calls: Answers asked for; one may take several requests.
        requests: Requests sent, the failed ones included.
        answered: Requests that were answered.
        prompt: Tokens read.
        completion: Tokens written.
        reasoning: Of `completion`, those not shown.
        cached: Of `prompt`, those that the endpoint had already.
        usd: Dollars for what was answered.
        unsettled: Requests without an answer that may have been billed all the same.
        held_tokens: At most so many tokens for those, and for answers without a count.
        held_usd: At most so many dollars for those; None without a price.
    """

    calls: int = 0
    requests: int = 0
    answered: int = 0
    prompt: int | None = 0
    completion: int | None = 0
    reasoning: int | None = 0
    cached: int | None = 0
    usd: float | None = 0.0
    unsettled: int = 0
    held_tokens: int = 0
    held_usd: float | None = 0.0

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def total(rows: Iterable[Row], calls: int, price: Price | None = None) -> Totals:
    """The sums over `rows`.

    Args:
        rows: Every request.
        calls: How many answers were asked for.
        price: For rows that were written while none was known.
    """
    rows = list(rows)
    answered = [row for row in rows if row.attempt.outcome == "ok"]
    held = [row for row in rows if row.held_tokens]

    def tokens(name: str) -> int | None:
        return _sum([getattr(row.usage, name) for row in answered])

    costs = [row.usd if row.usd is not None or price is None else price.usd(row.usage) for row in answered]
    prompt, completion = tokens("prompt"), tokens("completion")
    usd = _sum(costs)
    return Totals(
        calls=calls,
        requests=len(rows),
        answered=len(answered),
        prompt=prompt,
        completion=completion,
        reasoning=tokens("reasoning"),
        cached=tokens("cached"),
        usd=usd,
        unsettled=sum(row.attempt.outcome != "ok" for row in held),
        held_tokens=sum(row.held_tokens for row in held),
        held_usd=_sum([_held_usd(row, price) for row in held]),
    )


_Number = TypeVar("_Number", int, float)


def _sum(terms: list[_Number | None]) -> _Number | None:
    known = [term for term in terms if term is not None]
    return sum(known) if len(known) == len(terms) else None


def _held_usd(row: Row, price: Price | None) -> float | None:
    if row.held_usd is not None or price is None:
        return row.held_usd
    return row.held_tokens * max(price.prompt, price.completion) / _PER


def most(request: Request, max_tokens: int) -> Usage:
    """The most tokens that a request can take.

    A byte-level tokenizer never makes more tokens than there are bytes; the schema counts too, since
    endpoints that put it into the prompt bill it.
    """
    texts = [message["content"] for message in request.messages]
    if request.schema is not None:
        texts.append(json.dumps(request.schema))
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return Usage(size + _OVERHEAD * (len(texts) + 1), max_tokens)


@final
class Ledger:
    """Counts what is spent, and refuses the request that might pass a limit.

    Args:
        price: None if it is unknown.
        limits: Of the whole run; None for none.
    """

    def __init__(self, price: Price | None = None, limits: Limits | None = None) -> None:
        self.price = price
        self.limits = limits or Limits()
        self._rows: list[Row] = []
        self._first = 0
        self._calls = 0
        self._journal: Callable[[list[Row]], None] | None = None

    @property
    def totals(self) -> Totals:
        """The sums so far, earlier sittings included."""
        return total(self._rows, self._calls, self.price)

    def restore(self, rows: Iterable[Row]) -> None:
        """Take over the requests of a call of an earlier sitting."""
        self._rows += rows
        self._calls += 1

    def open_call(self, journal: Callable[[list[Row]], None] | None = None) -> None:
        """Begin a call.

        Args:
            journal: Is given the call's requests so far, each time before one is sent.
        """
        self._first = len(self._rows)
        self._calls += 1
        self._journal = journal

    def call_rows(self) -> list[Row]:
        """The requests of the call that was begun last."""
        return self._rows[self._first :]

    def reserve(self, request: Request, max_tokens: int) -> None:
        """Set aside the most that a request can cost, before it is sent.

        Raises:
            LLMBudgetError: That does not fit into what a limit leaves.
        """
        upper = most(request, max_tokens)
        tokens = (upper.prompt or 0) + (upper.completion or 0)
        usd = self.price.usd(upper) if self.price is not None else None
        self._check(tokens, usd)
        self._rows.append(Row(Attempt("sent", 0.0), held_tokens=tokens, held_usd=usd))
        if self._journal is not None:
            self._journal(self.call_rows())

    def settle(self, attempt: Attempt, usage: Usage | None = None) -> None:
        """Say what became of the request that was reserved last.

        Args:
            attempt: Its outcome.
            usage: Its tokens; None if it was not answered.
        """
        row = replace(self._rows[-1], attempt=attempt)
        if usage is not None:
            row = replace(row, usage=usage, usd=self.price.usd(usage) if self.price is not None else None)
            if usage.prompt is not None and usage.completion is not None:
                row = replace(row, held_tokens=0, held_usd=0.0)
        elif attempt.status is not None and 400 <= attempt.status < 500 and attempt.status != 408:
            row = replace(row, held_tokens=0, held_usd=0.0)  # refused before the model saw it
        self._rows[-1] = row

    def _check(self, tokens: int, usd: float | None) -> None:
        limits, spent = self.limits, self.totals
        go_on = "raise it and resume the run"
        if limits.max_calls is not None and spent.requests >= limits.max_calls:
            raise LLMBudgetError(
                f"`llm.max_calls` is {limits.max_calls}, and {spent.requests} requests were sent; {go_on}."
            )
        if limits.max_total_tokens is not None:
            used = sum(_tokens(row) for row in self._rows)
            if used + tokens > limits.max_total_tokens:
                raise LLMBudgetError(
                    f"`llm.max_total_tokens` is {limits.max_total_tokens}, {used} are used, and the next "
                    f"request may take {tokens}; {go_on}."
                )
        if limits.max_usd is not None:
            if usd is None:
                raise LLMBudgetError("`llm.max_usd` needs a price to be kept; give `llm.price`.")
            used_usd = sum(_usd(row, self.price) for row in self._rows)
            if used_usd + usd > limits.max_usd:
                raise LLMBudgetError(
                    f"`llm.max_usd` is {limits.max_usd:g}, {used_usd:.6f} may be spent, and the next request "
                    f"may cost {usd:.6f}; {go_on}."
                )


def _tokens(row: Row) -> int:
    """What a request counts for against a limit."""
    return row.held_tokens or (row.usage.prompt or 0) + (row.usage.completion or 0)


def _usd(row: Row, price: Price | None) -> float:
    if row.held_tokens:
        return _held_usd(row, price) or 0.0
    known = row.usd if row.usd is not None or price is None else price.usd(row.usage)
    return known or 0.0
