"""Whether a language model can propose: mode, speed, a sample and price, before a run depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

from llmevo.errors import LLMError
from llmevo.llm import MODES, DescribedClient, Endpoint, Reply, Request, canary
from llmevo.llm.decode import decode
from llmevo.llm.digest import rank
from llmevo.llm.encode import schema
from llmevo.llm.ledger import Totals
from llmevo.llm.prompt import Context, Prompts
from llmevo.llm.transcript import Transcript
from llmevo.space import Categorical, Float, Int, Params, Space

_CALLS = 3
_POINTS = 2
_SPACE = Space(
    {
        "learning_rate": Float(1e-5, 1e-2, log=True),
        "rank": Int(4, 64, log=True),
        "target": Categorical("attention", "mlp", "all"),
    }
)
_CONTEXT = Context(goal="the validation accuracy of a small LoRA fine-tuning", budget=20)


@final
@dataclass(frozen=True, slots=True)
class Check:
    """What was found.

    Args:
        client: What the client says of itself.
        mode: How a schema is enforced; None if it did not come so far.
        rungs: What was tried on the way there.
        seconds: Of each call for a sample.
        requested: Points that were asked for in all.
        valid: Points that came and could be used.
        sample: The first of them, or None.
        reply: The last answer as it came, shortened; for when it cannot be used.
        totals: Requests, tokens and dollars of this check.
        problem: What failed and what to do; None if the model can be used.
    """

    client: str
    mode: str | None
    rungs: tuple[canary.Rung, ...]
    seconds: tuple[float, ...]
    requested: int
    valid: int
    sample: Params | None
    reply: str
    totals: Totals
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "works": self.problem is None,
            "client": self.client,
            "mode": self.mode,
            "tried": [{"mode": r.mode, "verdict": r.verdict, "detail": r.detail} for r in self.rungs],
            "seconds": list(self.seconds),
            "requested": self.requested,
            "valid": self.valid,
            "sample": self.sample,
            "reply": self.reply,
            "spent": self.totals.to_json(),
            "problem": self.problem,
        }


@dataclass(slots=True)
class _Found:
    """What is known so far; a check that breaks off shows that much."""

    mode: str | None = None
    rungs: tuple[canary.Rung, ...] = ()
    replies: list[Reply] = field(default_factory=list)
    points: list[Params] = field(default_factory=list)


def check(client: Transcript, mode: str = "auto") -> Check:
    """Find the mode, then ask three times for two points of a small space.

    Args:
        client: Which model, on record so that its requests are counted.
        mode: Of `MODES`; `auto` to find out.
    """
    found = _Found()
    problem: str | None = None
    try:
        _mode(client, mode, found)
        for call in range(_CALLS):
            _sample(client, call, found)
    except LLMError as error:
        problem = str(error)
    shown = " ".join(found.replies[-1].text.split())[:200] if found.replies else ""
    if problem is None and not found.points:
        ended = found.replies[-1].finish_reason
        problem = (
            f"none of {_CALLS} answers could be used (the last ended with `{ended}`): raise "
            "`llm.max_tokens` if it was cut off, else use a larger model."
        )
    return Check(
        client=client.describe(),
        mode=found.mode,
        rungs=found.rungs,
        seconds=tuple(reply.seconds for reply in found.replies),
        requested=_POINTS * len(found.replies),
        valid=len(found.points),
        sample=found.points[0] if found.points else None,
        reply=shown,
        totals=client.totals,
        problem=problem,
    )


def _mode(client: Transcript, mode: str, found: _Found) -> None:
    endpoint = client.client
    if mode == "auto" and isinstance(endpoint, Endpoint):
        ladder = canary.climb(client)
        endpoint.enforce(ladder.mode)
        found.mode, found.rungs = ladder.mode, ladder.rungs
    elif mode in MODES:
        found.mode = mode


def _sample(client: DescribedClient, call: int, found: _Found) -> None:
    small = client.small
    form = schema(_SPACE, _POINTS, why=not small)
    messages: Sequence[Any] = Prompts(None).messages(
        _SPACE, "maximize", [], rank([], "maximize"), _POINTS, context=_CONTEXT, compact=small
    )
    reply = client.complete(Request(tuple(messages), form, seed=call, name="check"))
    found.mode = reply.mode
    found.replies.append(reply)
    if reply.finish_reason == "stop":
        found.points += decode(_SPACE, reply.text).points[:_POINTS]
