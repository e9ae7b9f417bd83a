"""Which shares of a training are rungs, and whether the budget has room for them.

All candidates of a run have the same shares, so the one with the fewest steps decides: the largest batch, the
smallest budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmevo.errors import GenomeError
from llmevo.genome.sections import HalvingSpec
from llmevo.genome.train import TrainSettings, TrainSpec, values_of
from llmevo.train.data import Example
from llmevo.train.loop import Step, plan, tokens_of, within

TOKENS = "train.tokens"
_FEWEST = 8  # optimizer steps of a first rung that is there by itself


def shares_of(
    spec: TrainSpec, halving: HalvingSpec, examples: Sequence[Example], seed: int, tokens: str = TOKENS
) -> tuple[tuple[float, ...], str]:
    """The shares of the tokens at which rungs below the last end.

    Args:
        spec: The section `train`.
        halving: The section `search.halving`.
        examples: To learn from.
        seed: Of their order.
        tokens: What the user calls the budget.

    Returns:
        The shares, and why there are none; that is empty where there are some, or none are wanted.

    Raises:
        GenomeError: A budget ends within the first batch, or rungs are asked for where they do not fit.
    """
    shortest = TrainSettings(
        batch_size=max(values_of(spec.batch_size)),
        tokens=min((v for v in values_of(spec.tokens) if v is not None), default=None),
        epochs=min((v for v in values_of(spec.epochs) if v is not None), default=1.0),
    )
    _check_budget(shortest, examples, seed, tokens)
    steps = plan(examples, shortest, seed)
    if halving.enabled is False:
        return (), ""
    shares = tuple(halving.tokens.shares)
    why = _misfit(spec, shares, steps, shortest.batch_size, 1 if halving.enabled else _FEWEST)
    if why and halving.enabled:
        raise GenomeError(f"`search.halving.enabled` must not be true here: {why}.")
    return ((), why) if why else (shares, "")


def _check_budget(shortest: TrainSettings, examples: Sequence[Example], seed: int, tokens: str) -> None:
    """A budget that ends within the first batch is a mistake: it would be one step on a part of a batch."""
    whole = tokens_of(plan(examples, replace(shortest, tokens=None, epochs=1.0), seed)[:1])
    of = f"the tokens of a first batch of {shortest.batch_size} examples"
    if shortest.tokens is not None and shortest.tokens < whole:
        remedy = ", or lower `train.batch_size`" if tokens == TOKENS else ""
        raise GenomeError(
            f"`{tokens}` must be >= {whole}, {of}, but may be {shortest.tokens}; raise it{remedy}."
        )
    total = sum(map(len, examples))
    if shortest.tokens is None and round(shortest.epochs * total) < whole:
        raise GenomeError(
            f"`train.epochs` must give >= {whole}, {of}, but may be {shortest.epochs:g}, which gives "
            f"{round(shortest.epochs * total)}; raise it, or lower `train.batch_size`."
        )


def _misfit(spec: TrainSpec, shares: Sequence[float], steps: Sequence[Step], batch: int, fewest: int) -> str:
    """Why a rung would say nothing; empty where none does."""
    first, last = shares[0], shares[-1]
    count = within(steps, first)
    tokens = tokens_of(steps)
    if count < fewest:
        short = f"ends before the first step of {tokens_of(steps[:1])}"
        held = f"has {count} steps, fewer than {fewest}"
        return (
            f"with {batch} examples a step, the first rung ({first:.0%} of {tokens} tokens) "
            f"{held if count else short}; raise `train.tokens` or `train.epochs`, or lower `train.batch_size`"
        )
    warmup = max(values_of(spec.warmup))
    if warmup >= first:
        return (
            f"the first rung ({first:.0%} of the tokens) would be over before the warm-up ({warmup:.0%}); "
            "lower `train.warmup`"
        )
    decay = max(values_of(spec.decay)) if "wsd" in values_of(spec.schedule) else 0.0
    if last > 1 - decay:
        return (
            f"the rung of {last:.0%} of the tokens would see the learning rate fall, as it does in the "
            f"last {decay:.0%}; lower `train.decay` or the last of `search.halving.tokens.shares`"
        )
    return ""
