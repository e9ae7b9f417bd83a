"""A base proposer with a guest for a share of the trials that it has to earn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, final

import numpy as np

from llmevo.errors import LLMContentError, LLMError, ProposerError
from llmevo.proposers import Direction, Proposer, make
from llmevo.proposers.screen import Screen
from llmevo.proposers.share import Share, Turns
from llmevo.space import Space
from llmevo.trial import Proposal, Trial


@final
class Hybrid:
    """Mixes two proposers; which one a point came from stands in its `origin` and in `attrs["guest"]`.

    The guest's turns are counted, not drawn: of the first k trials proposed after the warm-up, it has the
    floor of the sum of their shares (`attrs["share"]`), the spacing of Bresenham's line. With `adapt` the
    share falls while the guest wins less than the base (see `Share`). With `screen` a point of the guest
    that the history speaks against (see `Screen`) is turned away: the base takes the slot, and its trial says
    so in `attrs["turned_away"]`, a list of `{"origin", "params", "why", "attrs"}`. While the base waits for
    pending trials the guest gets no more than its turns.

    A guest that cannot go on raises; the base stands in for it only where `on_outage` is `base`, and then
    only for endpoints that do not serve, never for useless answers. Those trials have the origin
    `outage:<base's origin>`, and `attrs["outage"]` names the error's class.

    Args:
        space: What may vary.
        direction: `maximize` or `minimize`.
        base: Name of a proposer or an object with `propose`.
        guest: Name of a proposer or an object with `propose`; None for the `llm` proposer.
        share: The guest's share after the warm-up, in [0, 1]; with `adapt` the highest.
        warmup: Trials before the guest's first, enqueued ones included.
        adapt: Whether the share follows the guest's success.
        screen: Whether hopeless points are turned away.
        on_outage: `stop`, or `base` to go on without the guest for that batch.
        base_options: Options for a base given by name.
        **guest_options: Options for a guest given by name, or for `llm`.

    Raises:
        ProposerError: An argument is out of its range, or options were given for an object.
    """

    def __init__(
        self,
        space: Space,
        direction: Direction,
        *,
        base: str | Proposer = "cma",
        guest: str | Proposer | None = None,
        share: float = 0.3,
        warmup: int = 10,
        adapt: bool = True,
        screen: bool = True,
        on_outage: Literal["stop", "base"] = "stop",
        base_options: Mapping[str, Any] | None = None,
        **guest_options: Any,
    ) -> None:
        if not 0 <= share <= 1:
            raise ProposerError(f"`0 <= share <= 1` must hold, but got {share!r}.")
        if warmup < 0:
            raise ProposerError(f"`warmup >= 0` must hold, but got {warmup!r}.")
        if on_outage not in ("stop", "base"):
            raise ProposerError(f"`on_outage` must be 'stop' or 'base', but got {on_outage!r}.")
        for name, who in (("base", base), ("guest", guest)):
            if who in ("hybrid", "warmstart"):
                raise ProposerError(f"`{name}` must be a single proposer, but got {who!r}; name another.")
        if base_options and not isinstance(base, str):
            raise ProposerError(
                "`base_options` needs a `base` given by name; construct the object with them."
            )
        if guest_options and not (guest is None or isinstance(guest, str)):
            raise ProposerError(
                f"`guest` is an object, so these options would be lost: {', '.join(sorted(guest_options))}."
            )
        self.space = space
        self.direction: Direction = direction
        self.base = make(base, space, direction, **(base_options or {})) if isinstance(base, str) else base
        named = "llm" if guest is None else guest
        self.guest = make(named, space, direction, **guest_options) if isinstance(named, str) else named
        self.share = share
        self.warmup = warmup
        self.adapt = adapt
        self.screen = screen
        self.on_outage = on_outage
        self._share = Share(direction, share)
        self._turns = Turns(warmup)
        self._judge = Screen(space, direction)

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        """Suggest up to `n` points, the base's first and then the guest's.

        Raises:
            ProposerError: The base or the guest cannot go on.
        """
        share = self._share.now(trials) if self.adapt else self.share
        wanted = self._turns.owed(trials, share, n)
        own = self.base.propose(n - wanted, trials, rng) if wanted < n else []
        turns = (k for k in range(wanted, 0, -1) if k <= self._turns.owed(trials, share, len(own) + k))
        room = next(turns, 0)
        guests: list[Proposal] = []
        if room:
            try:
                # It sees what the base gave, so that it repeats none of it.
                beside = _pending(trials, _marked(own, share, guest=False))
                guests = self.guest.propose(room, beside, rng)
            except LLMContentError:
                raise
            except LLMError as error:
                if self.on_outage == "stop":
                    raise
                own += self._stand_in(room, trials, own, rng, error)
        kept, turned = self._screened(guests, trials)
        if turned:
            own, kept = self._replaced(own, kept, turned, trials, rng)
        if not own and not kept and wanted == n:
            # The guest has nothing new to offer (say, a finite space that it knows). Waiting for it would
            # end the search, so the base goes on; the guest's turn comes again.
            own = self.base.propose(n, trials, rng)
        return _marked(own, share, guest=False) + _marked(kept, share, guest=True)

    def _stand_in(
        self,
        count: int,
        trials: Sequence[Trial],
        own: Sequence[Proposal],
        rng: np.random.Generator,
        error: LLMError,
    ) -> list[Proposal]:
        """The base's points for the turns of a guest whose endpoint does not serve, labelled."""
        return [
            replace(
                proposal,
                origin=f"outage:{proposal.origin}",
                attrs={**proposal.attrs, "outage": type(error).__name__},
            )
            for proposal in self.base.propose(count, _pending(trials, own), rng)
        ]

    def _screened(
        self, guests: Sequence[Proposal], trials: Sequence[Trial]
    ) -> tuple[list[Proposal], list[tuple[Proposal, dict[str, float]]]]:
        """The guest's points that are worth an evaluation, and the others with the reason."""
        if not self.screen or not guests:
            return list(guests), []
        self._judge.look(trials)
        verdicts = [(proposal, self._judge.hopeless(proposal.params)) for proposal in guests]
        return (
            [proposal for proposal, why in verdicts if why is None],
            [(proposal, why) for proposal, why in verdicts if why is not None],
        )

    def _replaced(
        self,
        own: list[Proposal],
        kept: list[Proposal],
        turned: Sequence[tuple[Proposal, dict[str, float]]],
        trials: Sequence[Trial],
        rng: np.random.Generator,
    ) -> tuple[list[Proposal], list[Proposal]]:
        """The base's points in the slots of those turned away; where it has none, the guest's stay."""
        slots = self.base.propose(len(turned), _pending(trials, [*own, *kept]), rng)
        for proposal, (rejected, why) in zip(slots, turned, strict=False):
            note = {
                "origin": rejected.origin,
                "params": dict(rejected.params),
                "why": why,
                "attrs": rejected.attrs,
            }
            own = [*own, replace(proposal, attrs={**proposal.attrs, "turned_away": [note]})]
        return own, kept + [proposal for proposal, _ in turned[len(slots) :]]


def _pending(trials: Sequence[Trial], proposals: Sequence[Proposal]) -> list[Trial]:
    """The history as the base would see it if `proposals` had been handed out."""
    number = trials[-1].number + 1 if trials else 0
    return [
        *trials,
        *(
            Trial(number + index, p.params, p.origin, attrs=p.attrs, batch=number)
            for index, p in enumerate(proposals)
        ),
    ]


def _marked(proposals: Sequence[Proposal], share: float, *, guest: bool) -> list[Proposal]:
    return [replace(p, attrs={**p.attrs, "guest": guest, "share": share}) for p in proposals]
