"""A language model as proposer: it reads the best trials and answers with the next points.

After EvoLLM (https://arxiv.org/abs/2402.18381) and LLM-Evo-Merge: results from worst to best, integers, noise
of an evolution strategy around what the model says. One call asks for the whole batch. The first point of a
batch is evaluated exactly as the model gave it; the others get noise of the current strength, which no model
sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, final

import numpy as np

from llmevo.errors import LLMContentError, ProposerError
from llmevo.llm import ChatClient, Message, Reply, Request, client_from
from llmevo.llm.blocks import View, view
from llmevo.llm.decode import Decoded, decode
from llmevo.llm.digest import Ranked, rank
from llmevo.llm.encode import schema
from llmevo.llm.prompt import Aim, Prompts
from llmevo.llm.prompt import Context as Context
from llmevo.proposers import Direction
from llmevo.proposers.nearby import Known, Memory
from llmevo.space import Params, Space
from llmevo.strength import OneFifth, Strength
from llmevo.trial import Proposal, Trial

_FALLBACKS_IN_A_ROW = 5
_PROBLEMS = {
    "length": "it was cut off before its end",
    "empty": "it was empty",
    "no_json": "it holds no JSON object with proposals",
    "no_genome": "no proposal has a genome with the parameters' names",
    "too_long": "it was far too long",
}


@final
@dataclass(frozen=True, slots=True)
class _Answer:
    """What came of a call, the repair turn included."""

    decoded: Decoded
    reply: Reply
    notes: dict[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class _Question:
    """What a call is about."""

    n: int
    view: View
    sigma: float
    seed: int
    turn: int


@final
class LLM:
    """Asks a language model for the next points, and says of each where it came from.

    Origins: `start` (the space's start point, once, before anything is known), `llm` (exactly what the model
    gave), `llm+noise` (that with noise of the current strength), `llm+mutated` (the model repeated a known
    point or gave too few, so one of its points was mutated), `llm+incumbent` (noise around the best trial, in
    `mean` mode), `fallback:<reason>` (the answer was useless twice; drawn around the best trial with the
    current strength, without the model).

    In `mean` mode the model gives one genome for the whole batch: the first point is that mean itself, the
    second lies around the best trial, the others around the mean. The best trial itself is not evaluated
    again, since the same items would give the same score; its neighbourhood takes its place.

    `attrs["llm"]` says which call it was, and what the model gave where noise was added; the first point of a
    call also carries the counts of repairs, the tokens, the hash of the templates (in a run's first call that
    of each), and which genes were shown if not all were: see `llm.blocks`. A bad answer never stops a run,
    but five fallback calls in a row do; an endpoint that does not serve stops it at once.

    Args:
        space: What may vary.
        direction: `maximize` or `minimize`.
        client: Which model; None for what `llm.client_from(LLMSpec())` finds, made on the first call.
        strength: Standard deviation of the noise by history; None for `OneFifth()`.
        context: What the model is told beyond the space; None for nothing.
        mode: `points` for one genome from the model per proposal, `mean` for one per batch.
        perturb: Which new points get noise: the `rest` of a batch after its first, `all`, or `none`. In
            `mean` mode all but the mean do.
        compact: Whether to ask in few words and without reasons; None: for clients with `small`.
        prompts: Folder with templates that replace those of llmevo; None for none.

    Raises:
        ProposerError: `mode` or `perturb` is none of these.
        GenomeError: A template is wrong.
    """

    def __init__(
        self,
        space: Space,
        direction: Direction,
        *,
        client: ChatClient | None = None,
        strength: Strength | None = None,
        context: Context | None = None,
        mode: Literal["points", "mean"] = "points",
        perturb: Literal["rest", "all", "none"] = "rest",
        compact: bool | None = None,
        prompts: str | Path | None = None,
    ) -> None:
        if perturb not in ("rest", "all", "none"):
            raise ProposerError(f"`perturb` must be 'rest', 'all' or 'none', but got {perturb!r}.")
        if mode not in ("points", "mean"):
            raise ProposerError(f"`mode` must be 'points' or 'mean', but got {mode!r}.")
        self.space = space
        self.mode = mode
        self.direction: Direction = direction
        self.context = context or Context()
        self.perturb = perturb
        self._strength = strength or OneFifth()
        self._client = client
        self._compact = compact
        self._prompts = Prompts(prompts)
        self._memory = Memory(space, direction)

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        """Suggest up to `n` points; fewer if a finite space has no more.

        Raises:
            LLMError: The endpoint does not serve, or the fifth answer in a row was useless.
        """
        seed = int(rng.integers(2**31))
        ranked = rank(trials, self.direction)
        known, _ = self._memory.recall(trials)
        proposals = []
        if ranked.best is None and known.add(self.space.start()):
            proposals.append(Proposal(self.space.start(), "start"))
        if len(proposals) == n or known.complete:
            return proposals
        call = 1 + max((notes["call"] for notes, _ in _noted(trials)), default=-1)
        wanted = n - len(proposals) if self.mode == "points" else 1
        best = ranked.best.params if ranked.best is not None else None
        shown = view(self.space, best, call)
        sigma = self._strength(trials, self.direction)
        answer = self._ask(_Question(wanted, shown, sigma, seed, call), trials, ranked)
        problem = answer.decoded.problem
        if problem is not None and _fallbacks(trials) + 1 >= _FALLBACKS_IN_A_ROW:
            model = answer.reply.model or "the language model"
            raise LLMContentError(
                f"the last {_FALLBACKS_IN_A_ROW} answers of {model} could not be used, the last because "
                f"{_why(problem)}; use another `llm.model`, a larger `llm.max_tokens` or another "
                f"`search.proposer`, then resume the run."
            )
        made = self._points(n - len(proposals), answer.decoded, shown, ranked, known, sigma, rng)
        for slot, proposal in enumerate(made):
            notes = {"call": call, **proposal.attrs}
            if slot == 0:
                if call == 0:
                    notes["templates"] = self._prompts.hashes
                notes |= {"asked": wanted, "seed": seed, **answer.notes}
            made[slot] = replace(proposal, attrs={"llm": notes})
        return proposals + made

    def _points(
        self,
        n: int,
        decoded: Decoded,
        shown: View,
        ranked: Ranked,
        known: Known,
        sigma: float,
        rng: np.random.Generator,
    ) -> list[Proposal]:
        """`n` labelled points from an answer; fewer if the space is used up."""
        made: list[Proposal] = []
        if decoded.problem is not None:
            for _ in range(n):
                # Without an incumbent there is nothing to stay near.
                point = known.near(ranked.best.params, sigma, rng) if ranked.best else known.anywhere(rng)
                if point is not None:
                    made.append(Proposal(point, f"fallback:{decoded.problem}", {"strength": sigma}))
            return made
        if self.mode == "mean":
            return self._around(n, decoded.points[0], shown, ranked, known, sigma, rng)
        given = decoded.points[:n]
        for place in range(n):
            seen = given[place % len(given)]
            point = shown.up(seen)
            fresh = place < len(given) and not known.copied(point)
            noisy = self.perturb == "all" or (self.perturb == "rest" and any(p.origin == "llm" for p in made))
            if fresh and not noisy and known.add(point):
                made.append(Proposal(point, "llm"))
                continue
            nearby = known.near(seen, sigma, rng, shown)
            if nearby is not None:
                origin = "llm+noise" if fresh else "llm+mutated"
                made.append(Proposal(nearby, origin, {"proposed": point, "strength": sigma}))
        return made

    def _around(
        self,
        n: int,
        centre: Params,
        shown: View,
        ranked: Ranked,
        known: Known,
        sigma: float,
        rng: np.random.Generator,
    ) -> list[Proposal]:
        """The mean, a point around the incumbent, and the rest of a batch around the mean."""
        made: list[Proposal] = []
        mean = shown.up(centre)
        for place in range(n):
            if place == 0 and not known.copied(mean) and known.add(mean):
                made.append(Proposal(mean, "llm"))
                continue
            incumbent = ranked.best if place == 1 else None
            middle = centre if incumbent is None else shown.down(incumbent.params)
            point = known.near(middle, sigma, rng, shown)
            if point is not None:
                origin = "llm+incumbent" if incumbent else "llm+mutated" if place == 0 else "llm+noise"
                notes = {"strength": sigma} if incumbent else {"proposed": mean, "strength": sigma}
                made.append(Proposal(point, origin, notes))
        return made

    def _ask(self, question: _Question, trials: Sequence[Trial], ranked: Ranked) -> _Answer:
        """Ask, and once more if the answer cannot be used."""
        if self._client is None:
            from llmevo.genome import LLMSpec

            self._client = client_from(LLMSpec())
        n, shown, seed = question.n, question.view, question.seed
        compact = bool(getattr(self._client, "small", False)) if self._compact is None else self._compact

        def messages(count: int) -> tuple[Message, ...]:
            return self._prompts.messages(
                self.space,
                self.direction,
                trials,
                ranked,
                count,
                context=self.context,
                compact=compact,
                aim=Aim(shown, question.sigma, self.mode == "mean", question.turn),
            )

        parent = shown.down(ranked.best.params) if ranked.best is not None else None
        form = schema(shown.space, n, why=not compact)
        reply = self._client.complete(Request(messages(n), form, seed=seed, name="propose"))
        decoded = self._read(reply, shown, parent)
        first = decoded.problem
        if first is not None and first != "context":
            count = max(n // 2, 1) if first == "length" else n  # what was too long may fit by halves
            *before, last = messages(count)
            # A fresh conversation: a useless answer that stays in it breeds more of its kind.
            repair = {**last, "content": f"{last['content']}\n\n{self._prompts.repair(_why(first))}"}
            form = schema(shown.space, count, why=not compact)
            reply = self._client.complete(Request((*before, repair), form, seed=seed + 1, name="propose"))
            decoded = self._read(reply, shown, parent)
        notes: dict[str, Any] = {
            "mode": reply.mode,
            "usage": {key: value for key, value in asdict(reply.usage).items() if value is not None},
            "counts": {key: value for key, value in decoded.counts.items() if value},
            "prompts": self._prompts.digest,
        }
        if first is not None:
            notes["repaired"] = first
        if shown.kind != "all":
            notes["shown"] = {"kind": shown.kind, "genes": shown.space.names}
        return _Answer(decoded, reply, notes)

    def _read(self, reply: Reply, shown: View, parent: Params | None) -> Decoded:
        if reply.finish_reason in ("length", "empty", "malformed", "refusal", "content_filter", "context"):
            return Decoded(problem=reply.finish_reason)
        return decode(shown.space, reply.text, parent)


def _noted(trials: Sequence[Trial]) -> Iterator[tuple[dict[str, Any], str]]:
    """Our notes and origin of each point that we gave, also of those that a hybrid turned away."""
    for trial in trials:
        if "llm" in trial.attrs:
            yield trial.attrs["llm"], trial.origin
        for turned in trial.attrs.get("turned_away", ()):
            if "llm" in turned["attrs"]:
                yield turned["attrs"]["llm"], turned["origin"]


def _fallbacks(trials: Sequence[Trial]) -> int:
    """How many calls in a row, up to the last, ended in a fallback."""
    calls = {notes["call"]: origin.startswith("fallback:") for notes, origin in _noted(trials)}
    run = 0
    for call in sorted(calls, reverse=True):
        if not calls[call]:
            break
        run += 1
    return run


def _why(problem: str) -> str:
    return _PROBLEMS.get(problem, f"of `{problem}`" if problem == "context" else f"it ended with `{problem}`")
