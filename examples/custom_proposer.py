"""A proposer of your own: any class with `propose` goes wherever a built-in one goes.

This one is the (1+1)-ES with the one-fifth rule (Rechenberg 1973; here as in Kern et al. 2004,
https://doi.org/10.1023/B:NACO.0000023416.59689.4e): step from the best point, widen the step by `a` after
an improvement, narrow it by a**(-1/4) otherwise. It keeps no state: all it knows follows from the history, so
a run that is killed and continued proposes what it would have proposed.

    python examples/custom_proposer.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import llmevo
from llmevo.space import Params


class OnePlusOne:
    """(1+1)-ES in the unit cube.

    Args:
        space: What is searched.
        direction: `maximize` or `minimize`.
        sigma: First step.
        widen: Factor of the step after an improvement.
    """

    def __init__(
        self, space: llmevo.Space, direction: str, *, sigma: float = 0.2, widen: float = 1.5
    ) -> None:
        self.space = space
        self.sign = 1.0 if direction == "maximize" else -1.0
        self.sigma = sigma
        self.widen = widen

    def propose(
        self, n: int, trials: Sequence[llmevo.Trial], rng: np.random.Generator
    ) -> list[llmevo.Proposal]:
        """`n` steps from the best point so far."""
        best, value, sigma = self.space.start_unit(), -np.inf, self.sigma
        for trial in trials:
            if trial.value is None:
                continue  # pending or failed: nothing to learn
            if self.sign * trial.value > value:
                best, value = self.space.to_unit(trial.params), self.sign * trial.value
                sigma *= self.widen
            else:
                sigma *= self.widen**-0.25
        steps = sigma * rng.standard_normal((n, len(self.space)))
        points = np.clip(best + steps, 0.0, 1.0)
        return [llmevo.Proposal(self.space.from_unit(point), "one_plus_one") for point in points]


def ellipsoid(params: Params) -> float:
    """A valley with its bottom off the centre: 0 at best, the axes' curvatures 1 to 100."""
    point = np.array([float(value) for value in params.values()])
    return float(np.sum(100.0 ** np.linspace(0, 1, len(point)) * (point - 0.3) ** 2))


def run(proposer: str | OnePlusOne, space: llmevo.Space, trials: int = 150) -> float:
    search = llmevo.Optimizer(space, proposer=proposer, direction="minimize", seed=0)
    while len(search.trials) < trials:
        for trial in search.ask(1):
            search.tell(trial, ellipsoid(trial.params))
    assert search.best is not None
    assert search.best.value is not None
    return search.best.value


def main() -> dict[str, float]:
    space = llmevo.Space({f"weight_{i}": llmevo.Float(0.0, 1.5) for i in range(6)})
    found = {
        "random": run("random", space),
        "one_plus_one": run(OnePlusOne(space, "minimize"), space),
        "cma": run("cma", space),
    }
    for name, value in found.items():
        print(f"{name:13} {value:.2e}")
    return found


if __name__ == "__main__":
    main()
