"""The loop in your own hands: the core alone, with numpy and the proposer's library.

What is tuned here is a stand-in for a training run: the loss of a model over learning rate, rank and
optimizer, as one measures it, with noise. Any function of a dict will do.

    python examples/ask_tell.py [proposer]
"""

from __future__ import annotations

import math
import sys

import numpy as np

import llmevo
from llmevo.space import Params


def loss(params: Params, rng: np.random.Generator) -> float:
    """A valley at lr = 3e-4 that a larger rank lowers, with noise; `sgd` needs a rate ten times higher."""
    rate = float(params["lr"]) * (0.1 if params["optimizer"] == "sgd" else 1.0)
    valley = 0.15 * math.log10(rate / 3e-4) ** 2
    return 0.8 + valley + 0.3 / float(params["rank"]) + 0.005 * rng.standard_normal()


def main(proposer: str = "cma") -> llmevo.Trial:
    space = llmevo.Space(
        {
            "lr": llmevo.Float(1e-5, 1e-2, log=True),
            "rank": llmevo.Int(4, 128, log=True),
            "optimizer": llmevo.Categorical("adamw", "sgd"),
        }
    )
    rng = np.random.default_rng(1)
    search = llmevo.Optimizer(space, proposer=proposer, direction="minimize", seed=0)
    while len(search.trials) < 60:
        for trial in search.ask(6):
            search.tell(trial, loss(trial.params, rng))
    assert search.best is not None
    print(f"{proposer}: {search.best.value:.3f} at trial {search.best.number}: {search.best.params}")
    return search.best


if __name__ == "__main__":
    main(*sys.argv[1:2])
