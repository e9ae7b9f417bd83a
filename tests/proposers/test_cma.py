"""CMA-ES against the `cmaes` library driven by hand, and its rules for failures, guests and generations."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cmaes import CMA as ReferenceCMA
from cmaes import CatCMAwM, SepCMA

from llmevo import Categorical, Condition, Float, Int, Optimizer, ProposerError, Score, Space, State, Trial
from llmevo.proposers.cma import CMA

FLOATS = Space({f"x{i}": Float(-2, 2, init=0.4) for i in range(5)})
MIXED = Space(
    {
        "w": Float(0, 1),
        "rank": Int(4, 128, log=True),
        "fixed": Int(3, 3),
        "target": Categorical("q", "v", "all"),
        "flag": Categorical(False, True),
        "size": Categorical(8, 16, 32, ordered=True),
    }
)


def sphere(space: Space, trial: Trial) -> float:
    return float(np.sum((space.to_unit(trial.params) - 0.6) ** 2))


def finish(opt: Optimizer, count: int, batch: int = 7) -> None:
    while len(opt.trials) < count:
        for trial in opt.ask(batch):
            opt.tell(trial, sphere(opt.space, trial))


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("dimension", [1, 5, 101])
def test_equals_the_library_driven_by_hand(dimension: int, direction: str) -> None:
    space = Space({f"x{i}": Float(-2, 2, init=0.4) for i in range(dimension)})
    method = ReferenceCMA if dimension <= 100 else SepCMA
    reference = method(
        mean=space.start_unit(),
        sigma=1 / 6,
        bounds=np.array([[0.0, 1.0]] * dimension),
        n_max_resampling=1,
        seed=0,
    )
    size = reference.population_size
    sign = 1.0 if direction == "minimize" else -1.0
    opt = Optimizer(space, "cma", direction=direction, seed=4)
    for _ in range(12):
        # The proposer draws the seed of the library's generator from the rng of the ask.
        reference.reseed_rng(int(np.random.default_rng([4, len(opt.trials)]).integers(2**32)))
        drawn = [reference.ask() for _ in range(size)]
        trials = opt.ask(size)
        assert [space.from_unit(unit) for unit in drawn] == [trial.params for trial in trials]
        told = []
        for unit, trial in zip(drawn, trials, strict=True):
            value = float(np.sum(np.arange(1, dimension + 1) * (unit - 0.3) ** 2))
            opt.tell(trial, sign * value)
            told.append((unit, value))
        reference.tell(told)


def test_the_method_follows_the_space() -> None:
    def searcher(space: Space) -> object:
        return CMA(space, "maximize")._search

    assert isinstance(searcher(Space({f"x{i}": Float(0, 1) for i in range(100)})), ReferenceCMA)
    assert isinstance(searcher(Space({f"x{i}": Float(0, 1) for i in range(101)})), SepCMA)
    assert isinstance(searcher(MIXED), CatCMAwM)
    assert isinstance(searcher(Space({"x": Float(0, 1), "i": Int(0, 10**6)})), ReferenceCMA)
    mixed = searcher(MIXED)
    assert (mixed.n_continuous, mixed.n_integer, mixed.n_categorical) == (1, 2, 2)
    assert searcher(Space({"a": Int(1, 1)})) is None


def test_a_generation_waits_for_its_last_trial() -> None:
    opt = Optimizer(FLOATS, CMA(FLOATS, "minimize", population=6), direction="minimize")
    first = opt.ask(4) + opt.ask(4)
    assert len(first) == 6
    assert opt.ask(4) == []
    for trial in first[1:]:
        opt.tell(trial, 1.0 + trial.number)
    assert opt.ask(4) == []
    assert opt.stop_reasons() == {}
    opt.tell(first[0], error="gone")
    second = opt.ask(4)
    assert len(second) == 4
    assert {trial.attrs["cma"]["generation"] for trial in second} == {1}


def test_the_order_of_telling_does_not_matter() -> None:
    runs = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 4, 0, 3, 1]):
        opt = Optimizer(FLOATS, CMA(FLOATS, "minimize", population=6), direction="minimize")
        for _ in range(4):
            trials = opt.ask(6)
            for place in order:
                opt.tell(trials[place], sphere(FLOATS, trials[place]))
        runs.append(opt.trials)
    assert runs[0] == runs[1]


def test_a_failure_ranks_behind_the_worst() -> None:
    def next_generation(outcome: float | None) -> list[Trial]:
        opt = Optimizer(FLOATS, CMA(FLOATS, "maximize", population=6), direction="maximize")
        for trial in opt.ask(6):
            if trial.number == 2 and outcome is None:
                opt.tell(trial, error="NaN weights")
            else:
                opt.tell(trial, outcome if trial.number == 2 else float(trial.number))
        return opt.ask(6)

    assert next_generation(None) == next_generation(-100.0)
    assert next_generation(None) != next_generation(2.5)


@pytest.mark.parametrize("space", [FLOATS, MIXED])
def test_a_generation_that_failed_moves_nothing(space: Space) -> None:
    def draw(state: State) -> list[dict[str, object]]:
        proposer = CMA(space, "maximize")
        trials = [
            Trial(i, p.params, p.origin, attrs=p.attrs)
            for i, p in enumerate(proposer.propose(99, [], np.random.default_rng(0)))
        ]
        told = [replace(t, state=state, error="no") if state is State.FAILED else t for t in trials]
        rest = [] if state is State.PENDING else told
        return [p.params for p in CMA(space, "maximize").propose(99, rest, np.random.default_rng(7))]

    assert draw(State.FAILED) == draw(State.PENDING)


def test_guests_count_into_their_generation_as_raw_points() -> None:
    proposer = CMA(FLOATS, "minimize", population=4)
    target = FLOATS.validate({f"x{i}": 1.5 for i in range(5)})
    trials: list[Trial] = []

    def add(params: dict, attrs: dict, value: float) -> None:
        trials.append(Trial(len(trials), params, "x", state=State.COMPLETE, attrs=attrs, score=Score(value)))

    for generation in range(8):
        own = proposer.propose(9, trials, np.random.default_rng(generation))
        assert len(own) == 4
        for proposal in own[:2]:
            add(proposal.params, proposal.attrs, 5.0)
        for value in (0.0, 0.1):
            add(target, {"guest": True}, value)
        add(target, {}, -99.0)  # enqueued: evaluated, but not part of the strategy
    mean = np.mean([FLOATS.to_unit(p.params) for p in proposer.propose(9, trials, np.random.default_rng(1))])
    assert abs(mean - FLOATS.to_unit(target)[0]) < 0.08


def test_a_guest_says_nothing_of_genes_that_it_does_not_use() -> None:
    space = Space(
        {"m": Categorical("a", "b"), "x": Float(0, 1, init=0.1), "c": Categorical("u", "v", "w")},
        {"x": Condition("m", ("a",)), "c": Condition("m", ("a",))},
    )
    proposer = CMA(space, "minimize", population=6)
    before = proposer._search._mean.copy(), proposer._search._q.copy()
    trials = [
        Trial(
            i,
            {"m": "b", "x": None, "c": None},
            "llm",
            state=State.COMPLETE,
            attrs={"guest": True},
            score=Score(i),
        )
        for i in range(6)
    ]
    proposer.propose(1, trials, np.random.default_rng(0))
    assert proposer._search.generation == 1
    assert np.allclose(proposer._search._mean, before[0])
    assert np.allclose(proposer._search._q[1], before[1][1])
    assert proposer._search._q[0, 1] > 0.5


def generation(
    proposer: CMA, trials: list[Trial], seed: int, value: Callable[[np.ndarray], float], guests: float = 0.0
) -> None:
    """Evaluate a generation, and with the probability `guests` a foreign point for each of its own."""
    rng = np.random.default_rng(seed)
    fresh = [(p.params, p.attrs) for p in proposer.propose(99, trials, rng)]
    fresh += [(proposer.space.sample(rng), {"guest": True}) for _ in fresh if rng.random() < guests]
    for params, attrs in fresh:
        score = Score(value(proposer.space.to_unit(params)))
        trials.append(Trial(len(trials), params, "x", state=State.COMPLETE, attrs=attrs, score=score))


def bowl(unit: np.ndarray) -> float:
    return float(np.sum((unit - 0.6) ** 2))


def test_a_search_that_shrank_to_a_point_starts_anew_there() -> None:
    proposer, trials = CMA(Space({"x": Float(0, 1)}), "minimize"), []
    first = proposer._search
    for seed in range(600):
        generation(proposer, trials, seed, bowl)
        if proposer._search is not first:
            break
    step = [trial.params["x"] for trial in trials[-8:-4]]
    assert max(step) - min(step) < 1e-9
    for seed in range(3):
        generation(proposer, trials, seed, bowl)
    step = [trial.params["x"] for trial in trials[-12:]]
    assert max(step) - min(step) > 0.05
    assert abs(float(np.median(step)) - 0.6) < 0.1


def test_a_distribution_that_rounding_broke_starts_anew() -> None:
    proposer, trials = CMA(Space({"i": Int(0, 9), "j": Int(0, 250)}), "minimize", population=3), []
    first = proposer._search
    for seed in range(60):
        # An objective that turns round, with guests: the library's covariance becomes NaN on the way.
        generation(proposer, trials, seed, lambda u, s=seed: float(np.sum(u)) * (-1) ** (s // 7), guests=0.4)
        assert np.isfinite(proposer._search._C).all()
        assert np.isfinite(proposer._search._mean).all()
    assert proposer._search is not first
    assert all(proposer.space.validate(trial.params) == trial.params for trial in trials)


def test_a_far_guest_does_not_blow_up_the_step() -> None:
    def spread(count: int) -> float:
        """Median distance between the last points of the base and their mean."""
        own = [FLOATS.to_unit(trial.params) for trial in trials if "cma" in trial.attrs][-count:]
        return float(np.median(np.abs(np.array(own) - np.mean(own, axis=0))))

    proposer, trials = CMA(FLOATS, "minimize"), []
    for seed in range(60):
        generation(proposer, trials, seed, bowl)
    assert spread(16) < 1e-3
    far = FLOATS.validate({f"x{i}": -1.5 for i in range(5)})
    for seed in range(12):
        # One guest a generation, far away and better than all; unguarded, the step grows to 1e32.
        trials.append(
            Trial(
                len(trials), far, "llm", state=State.COMPLETE, attrs={"guest": True}, score=Score(-1.0 - seed)
            )
        )
        generation(proposer, trials, seed, bowl)
    last = np.array([FLOATS.to_unit(trial.params) for trial in trials if "cma" in trial.attrs][-21:])
    assert ((last > 0) & (last < 1)).mean() > 0.5
    assert np.abs(last.mean(axis=0) - FLOATS.to_unit(far)).max() < 0.3  # around the guest, not in corners


def test_a_start_on_the_bounds_still_searches() -> None:
    space = Space(
        {"a": Float(0, 1, init=0.0), "b": Int(0, 9, init=9), "c": Float(1, 100, log=True, init=100)}
    )
    opt = Optimizer(space, "cma", direction="minimize")
    finish(opt, 100)
    assert opt.best is not None
    assert opt.best.value is not None
    assert opt.best.value < 0.01


def test_asking_costs_the_same_late_in_a_run() -> None:
    opt = Optimizer(FLOATS, "cma", direction="minimize")

    def seconds() -> float:
        times = []
        for _ in range(40):
            start = time.perf_counter()
            trials = opt.ask()
            times.append(time.perf_counter() - start)
            for trial in trials:
                opt.tell(trial, sphere(FLOATS, trial))
        return float(np.median(times))

    early = seconds()
    finish(opt, 2000, batch=50)
    assert seconds() < 3 * early + 0.002  # replaying 2,000 trials takes about 0.1 s


@pytest.mark.parametrize("options", [{"population": 1}, {"sigma0": 0.0}, {"sigma0": 1.5}])
def test_refuses_what_cannot_work(options: dict[str, float]) -> None:
    with pytest.raises(ProposerError, match=next(iter(options))):
        CMA(FLOATS, "maximize", **options)


@pytest.mark.parametrize("population", [2, 3])
@pytest.mark.parametrize("space", [FLOATS, MIXED])
def test_small_populations(space: Space, population: int) -> None:
    opt = Optimizer(space, CMA(space, "minimize", population=population), direction="minimize")
    finish(opt, 60)
    assert len({space.key(trial.params) for trial in opt.trials}) > 20
