"""The Sobol sequence goes on where the history stops, whatever else stands in it."""

from __future__ import annotations

import pytest

from llmevo import Float, Optimizer, ProposerError, Space
from llmevo.proposers.hybrid import Hybrid
from llmevo.proposers.random import Random
from llmevo.proposers.sobol import Sobol

SPACE = Space({f"x{i}": Float(0, 1) for i in range(3)})


def test_sobol_covers_more_evenly_and_ignores_the_others_in_the_history() -> None:
    opt = Optimizer(
        SPACE,
        Hybrid(SPACE, "maximize", base="sobol", guest=Random(SPACE, "maximize"), warmup=0),
        direction="maximize",
    )
    for _ in range(20):
        opt.ask(5)
    own = [trial for trial in opt.trials if trial.origin == "sobol"]
    assert [trial.attrs["sobol"]["index"] for trial in own] == list(range(70))
    for name in SPACE:
        cells = {int(trial.params[name] * 64) for trial in own[:64]}
        assert len(cells) == 64  # one point in each of 64 slices of every axis: a (t, m, s)-net


def test_sobol_refuses_more_genes_than_it_has_dimensions() -> None:
    space = Space({f"x{i}": Float(0, 1) for i in range(21202)})
    with pytest.raises(ProposerError, match="21201"):
        Sobol(space, "maximize")
