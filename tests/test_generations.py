"""What the report says of a population's generations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmevo import Float, Optimizer, Space
from llmevo.proposers.population import SKETCH, distance
from llmevo.report import svg
from llmevo.report.generations import draw, generations
from llmevo.trial import Trial

SPACE = Space({"x": Float(0, 1, init=0.5), "y": Float(0, 1)})


def history(batches: int, seed: int = 0) -> list[Trial]:
    """Individuals whose change of the weights is four numbers; each fifth fails."""
    opt = Optimizer(SPACE, "population", direction="maximize", seed=seed)
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        for asked in opt.ask(6):
            sketch = {SKETCH: {str(place): float(value) for place, value in enumerate(rng.normal(size=4))}}
            if asked.number % 5 == 4:
                opt.tell(asked, error="diverged")
            else:
                opt.tell(asked, float(rng.normal()), metrics=sketch)
    return list(opt.trials)


def test_a_generation_is_a_batch_and_what_survives_it() -> None:
    trials = history(5)
    found = generations(trials, "maximize", 6)
    assert [one.number for one in found] == [1, 2, 3, 4, 5]
    whole = [trial for trial in trials if trial.score is not None]
    assert [trial for one in found for trial in one.new] == whole
    for one in found:
        values = [trial.value for trial in one.new]
        until = [trial for trial in whole if trial.number <= one.new[-1].number]
        assert one.mean == pytest.approx(np.mean(values))
        assert one.best == max(trial.value for trial in until)
        # The survivors are chosen by their scores, but for those that are nearly others.
        assert one.alive >= one.mean
    pairs = [distance(a, b) for place, a in enumerate(found[0].new) for b in found[0].new[:place]]
    assert found[0].apart == pytest.approx(np.mean(pairs))
    assert 0.5 < found[-1].alive_apart < 2
    least = generations(trials, "minimize", 6)
    assert least[-1].best == min(trial.value for trial in whole)
    assert least[-1].alive < found[-1].alive


def test_other_runs_have_no_generations() -> None:
    bare = [
        Trial(trial.number, trial.params, "random", trial.state, score=trial.score) for trial in history(2)
    ]
    assert generations(bare, "maximize", 6) == []
    assert generations([], "maximize") == []


def test_one_that_failed_whole_is_left_out_and_one_alone_has_no_diversity() -> None:
    trials = history(3)
    alone = [trial for trial in trials if trial.batch != 6 and trial.number < 13]
    assert [one.number for one in generations([*alone], "maximize", 6)] == [1, 2]
    (*_, last) = generations(alone, "maximize", 6)
    assert len(last.new) == 1
    assert last.apart is None
    assert last.alive_apart is not None
    assert not math.isnan(last.mean)


def test_the_drawing_follows_the_theme() -> None:
    pytest.importorskip("matplotlib")
    drawing = draw(generations(history(4), "maximize", 6))
    assert all(f"var(--{role})" in drawing for role in ("ink", "green", "purple", "muted"))
    assert not {light for light, _ in svg.ROLES.values() if light in drawing}
    assert all(text in drawing for text in ("best so far", "survivors, mean", "unrelated"))
