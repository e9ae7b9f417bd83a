"""A base proposer with a guest for an exact share of the trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np

from llmevo.errors import ProposerError
from llmevo.proposers import Direction, Proposer, make
from llmevo.space import Space
from llmevo.trial import Proposal, Trial

_ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


@final
class Hybrid:
    """Mixes two proposers; which one a point came from stands in its `origin` and in `attrs["guest"]`.

    The guest's part is counted, not drawn: of the first k trials proposed after the warm-up, it has
    `floor(share * k)`, the spacing of Bresenham's line. While the base waits for pending trials the guest
    gets no more than that. A guest that cannot go on raises; the base does not stand in for it.

    Args:
        space: What may vary.
        direction: `maximize` or `minimize`.
        base: Name of a proposer or an object with `propose`.
        guest: An object with `propose`, of another class than the base; None for the `llm` proposer.
        share: The guest's share after the warm-up, in [0, 1].
        warmup: Trials before the guest's first, enqueued ones included.
        base_options: Options for a base given by name.
        **llm_options: Options for the `llm` proposer where `guest` is None.

    Raises:
        ProposerError: An argument is out of its range, or options were given for an object.
    """

    def __init__(
        self,
        space: Space,
        direction: Direction,
        *,
        base: str | Proposer = "cma",
        guest: Proposer | None = None,
        share: float = 0.3,
        warmup: int = 10,
        base_options: Mapping[str, Any] | None = None,
        **llm_options: Any,
    ) -> None:
        if not 0 <= share <= 1:
            raise ProposerError(f"`0 <= share <= 1` must hold, but got {share!r}.")
        if warmup < 0:
            raise ProposerError(f"`warmup >= 0` must hold, but got {warmup!r}.")
        if base == "hybrid":
            raise ProposerError("`base` must be another proposer than 'hybrid'; name a single one.")
        if base_options and not isinstance(base, str):
            raise ProposerError(
                "`base_options` needs a `base` given by name; construct the object with them."
            )
        if llm_options and guest is not None:
            raise ProposerError(
                f"`guest` is an object, so these options would be lost: {', '.join(sorted(llm_options))}."
            )
        self.base = make(base, space, direction, **(base_options or {})) if isinstance(base, str) else base
        self.guest = make("llm", space, direction, **llm_options) if guest is None else guest
        self.share = share
        self.warmup = warmup

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        """Suggest up to `n` points, the base's first and then the guest's.

        Raises:
            ProposerError: The base or the guest cannot go on.
        """
        shared = guests = 0
        for place, trial in enumerate(trials):
            mark = trial.attrs.get("guest")
            if mark is not None:  # enqueued points belong to neither
                guests += mark
                shared += place >= self.warmup
        start = max(self.warmup - len(trials), 0)

        def entitled(count: int) -> int:
            """How many of the next `count` trials are the guest's."""
            total = shared + max(count - start, 0)
            owed = math.floor(self.share * total + _ROUNDING) - guests
            return min(max(owed, 0), count)

        wanted = entitled(n)
        proposals: list[Proposal] = []
        if wanted < n:
            proposals = _marked(self.base.propose(n - wanted, trials, rng), guest=False)
        room = max((k for k in range(wanted + 1) if k <= entitled(len(proposals) + k)), default=0)
        if room:
            proposals += _marked(self.guest.propose(room, trials, rng), guest=True)
        if not proposals and wanted == n:
            # The guest has nothing new to offer (say, a finite space that it knows). Waiting for it would
            # end the search, so the base goes on; the guest's turn comes again.
            proposals = _marked(self.base.propose(n, trials, rng), guest=False)
        return proposals


def _marked(proposals: Sequence[Proposal], *, guest: bool) -> list[Proposal]:
    return [replace(proposal, attrs={**proposal.attrs, "guest": guest}) for proposal in proposals]
