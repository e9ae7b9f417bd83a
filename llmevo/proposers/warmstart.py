"""A language model once, for the first few points; then a base proposer alone.

What a model knows beforehand is worth most before anything is known, and costs one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np

from llmevo.errors import ProposerError
from llmevo.proposers import Direction, Proposer, make
from llmevo.space import Space
from llmevo.trial import Proposal, Trial

_MOST = 8
_SHARE = 0.2


@final
class Warmstart:
    """The guest's first points, then the base.

    One call gives the whole design: at most eight points, and at most a fifth of `budget`. What does not fit
    into the first batch waits in `attrs["warmstart"]` of the run's first trial of it, so that no second call
    is made, nor by a resumed run. The points count as guests (`attrs["guest"]`), so CMA-ES learns from them
    as from its own first generation. If the guest's answer was useless, the base proposes at once, under the
    origin `fallback:<reason>`.

    Args:
        space: What may vary.
        direction: `maximize` or `minimize`.
        base: Name of a proposer or an object with `propose`.
        guest: An object with `propose`; None for the `llm` proposer without noise.
        budget: Trials of the whole search; None if unknown, for eight points.
        base_options: Options for a base given by name.
        **guest_options: Options for the `llm` proposer where `guest` is None.

    Raises:
        ProposerError: `budget` is out of its range, or options were given for an object.
    """

    def __init__(
        self,
        space: Space,
        direction: Direction,
        *,
        base: str | Proposer = "cma",
        guest: Proposer | None = None,
        budget: int | None = None,
        base_options: Mapping[str, Any] | None = None,
        **guest_options: Any,
    ) -> None:
        if budget is not None and budget < 1:
            raise ProposerError(f"`budget >= 1` must hold, but got {budget!r}.")
        if base in ("hybrid", "warmstart"):
            raise ProposerError(f"`base` must be a single proposer, but got {base!r}.")
        if base_options and not isinstance(base, str):
            raise ProposerError(
                "`base_options` needs a `base` given by name; construct the object with them."
            )
        if guest_options and guest is not None:
            raise ProposerError(
                f"`guest` is an object, so these options would be lost: {', '.join(sorted(guest_options))}."
            )
        self.base = make(base, space, direction, **(base_options or {})) if isinstance(base, str) else base
        self.guest = (
            make("llm", space, direction, **{"perturb": "none", **guest_options}) if guest is None else guest
        )
        self.size = _MOST if budget is None else max(min(_MOST, int(_SHARE * budget)), 1)

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        """Suggest up to `n` points: what is left of the design, then the base's.

        Raises:
            ProposerError: The guest or the base cannot go on.
        """
        given = [trial.attrs["warmstart"] for trial in trials if "warmstart" in trial.attrs]
        if given:
            design: list[dict[str, Any]] = next((note["design"] for note in given if "design" in note), [])
            left = design[len(given) :]
            points = [
                Proposal(item["params"], item["origin"], {**item["attrs"], "warmstart": {}, "guest": True})
                for item in left[:n]
            ]
        else:
            found = self.guest.propose(self.size, trials, rng)
            if not found or any(proposal.origin.startswith("fallback:") for proposal in found):
                return self._without(n, trials, rng, found)
            points = _first(found, n)
        if len(points) < n:
            pending = [
                Trial(len(trials) + index, p.params, p.origin, attrs=p.attrs)
                for index, p in enumerate(points)
            ]
            points += self.base.propose(n - len(points), [*trials, *pending], rng)
        return points

    def _without(
        self, n: int, trials: Sequence[Trial], rng: np.random.Generator, found: Sequence[Proposal]
    ) -> list[Proposal]:
        """The base's points, and why there are none of the guest."""
        reasons = [proposal for proposal in found if proposal.origin.startswith("fallback:")]
        origin = reasons[0].origin if reasons else "fallback:none"
        notes = reasons[0].attrs if reasons else {}
        made = self.base.propose(n, trials, rng)
        return [
            replace(proposal, origin=origin, attrs={**proposal.attrs, **notes, "warmstart": {}})
            for proposal in made
        ]


def _first(design: Sequence[Proposal], n: int) -> list[Proposal]:
    """The first `n` points of a design; the first of all carries the whole of it."""
    whole = [{"params": dict(p.params), "origin": p.origin, "attrs": p.attrs} for p in design]
    return [
        replace(p, attrs={**p.attrs, "warmstart": {"design": whole} if place == 0 else {}, "guest": True})
        for place, p in enumerate(design[:n])
    ]
