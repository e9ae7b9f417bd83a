"""The arms of the comparison: llmevo's proposers, and what other libraries offer for the same job.

Every arm gets the same first points (the start point and three drawn ones: in a run they are the baseline,
the parents and the uniform merge), the same number of evaluations, the same batches, and answers drawn
from the same random numbers. Each arm uses the first points as far as its library can.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
from guests import FAIR_CHOICE, FAIR_NOISE, GOOD_CHOICE, GOOD_NOISE, guesser, random_json
from spaces import Problem

from llmevo import Optimizer
from llmevo.proposers import make
from llmevo.space import Categorical, Int, Params, Space
from llmevo.trial import Score

Point = tuple[Params, str]  # what to evaluate, and its origin


class Search(Protocol):
    """One search under way."""

    def ask(self, n: int) -> list[Point]:
        """Up to `n` points to evaluate together; at least one."""
        ...

    def tell(self, params: Sequence[Params], scores: Sequence[Score]) -> None:
        """The scores of the points of the last `ask`, in order."""
        ...


class Ours:
    """A proposer of llmevo under its optimizer."""

    def __init__(self, space: Space, seed: int, first: Sequence[Params], proposer: Any) -> None:
        self.optimizer = Optimizer(space, proposer, direction="maximize", seed=seed)
        for params in first:
            self.optimizer.enqueue(params, origin="first")
        self._asked: list[Any] = []

    def ask(self, n: int) -> list[Point]:
        """The optimizer's next batch."""
        self._asked = self.optimizer.ask(n)
        return [(trial.params, trial.origin) for trial in self._asked]

    def tell(self, params: Sequence[Params], scores: Sequence[Score]) -> None:
        """Tell the scores, with their items."""
        for trial, score in zip(self._asked, scores, strict=True):
            self.optimizer.tell(trial, score)


class ByHand:
    """A library's CMA-ES on the unit cube; the first points are evaluated and, but for the start, unused."""

    def __init__(self, problem: Problem, first: Sequence[Params], sample: Any, update: Any) -> None:
        self._space = problem.space
        self._waiting = list(first)
        self._sample, self._update = sample, update
        self._raw: list[Any] = []
        self._generation: list[tuple[Any, float]] = []

    def ask(self, n: int) -> list[Point]:
        """The first points, then the members of a generation, `n` of which are one."""
        if self._waiting:
            points, self._waiting = self._waiting[:n], self._waiting[n:]
            self._raw = []
            return [(params, "first") for params in points]
        self._raw = self._sample(n)
        return [(self._space.from_unit(np.clip(raw, 0.0, 1.0)), "library") for raw in self._raw]

    def tell(self, params: Sequence[Params], scores: Sequence[Score]) -> None:
        """One generation; these libraries minimise."""
        if self._raw:
            self._update(self._raw, [-score.value for score in scores])


def cmaes_by_hand(problem: Problem, seed: int, first: Sequence[Params], batch: int) -> ByHand:
    """`cmaes.CMA` as its README shows it."""
    from cmaes import CMA

    d = len(problem.space)
    search = CMA(
        mean=problem.space.start_unit(),
        sigma=1 / 6,
        bounds=np.array([[0.0, 1.0]] * d),
        seed=seed,
        population_size=batch,
    )

    def sample(n: int) -> list[Any]:
        return [search.ask() for _ in range(search.population_size)]

    def update(raw: Sequence[Any], values: Sequence[float]) -> None:
        search.tell(list(zip(raw, values, strict=True)))

    return ByHand(problem, first, sample, update)


def pycma(problem: Problem, seed: int, first: Sequence[Params], batch: int) -> ByHand:
    """The library pycma, with its own treatment of bounds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cma

        options = {"bounds": [0, 1], "seed": seed + 1, "verbose": -9, "popsize": batch}
        search = cma.CMAEvolutionStrategy(problem.space.start_unit(), 1 / 6, options)

    def sample(n: int) -> list[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(search.ask())

    def update(raw: Sequence[Any], values: Sequence[float]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            search.tell(list(raw), list(values))

    return ByHand(problem, first, sample, update)


class Optuna:
    """An optuna study, asked for a batch at a time; it knows the first points as finished trials."""

    def __init__(self, space: Space, first: Sequence[Params], sampler: Any) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = space
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._waiting = list(first)
        self._trials: list[Any] = []

    def ask(self, n: int) -> list[Point]:
        """The first points, then the study's."""
        first, self._waiting = self._waiting[:n], self._waiting[n:]
        for params in first:
            self._study.enqueue_trial(self._written(params))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._trials = [self._study.ask() for _ in range(len(first) or n)]
            points = [self._suggested(trial) for trial in self._trials]
        return [(params, "first" if first else "library") for params in points]

    def _written(self, params: Params) -> dict[str, Any]:
        """The point as `_suggested` reads it."""
        genes = self._space.genes
        return {
            name: gene.index(value)
            if isinstance(gene := genes[name], Categorical) and gene.ordered
            else value
            for name, value in params.items()
            if self._space.is_active(name, params)
        }

    def _suggested(self, trial: Any) -> Params:
        params: Params = {}
        for name, gene in self._space.genes.items():
            if not self._space.is_active(name, params):
                params[name] = None
            elif isinstance(gene, Categorical):
                # A grid is the index of its value: optuna has no ordered choice.
                place = trial.suggest_int(name, 0, gene.count - 1) if gene.ordered else None
                choice = trial.suggest_categorical(name, gene.choices) if place is None else None
                params[name] = choice if place is None else gene.choices[place]
            elif isinstance(gene, Int):
                params[name] = trial.suggest_int(name, gene.low, gene.high, log=gene.log)
            else:
                params[name] = trial.suggest_float(name, gene.low, gene.high, log=gene.log)
        return self._space.validate(params)

    def tell(self, params: Sequence[Params], scores: Sequence[Score]) -> None:
        """Tell the study."""
        for trial, score in zip(self._trials, scores, strict=True):
            self._study.tell(trial, score.value)


def optuna_tpe(problem: Problem, seed: int, first: Sequence[Params], batch: int) -> Optuna:
    """The default sampler of optuna with its default settings."""
    import optuna

    return Optuna(problem.space, first, optuna.samplers.TPESampler(seed=seed))


def optuna_cma(problem: Problem, seed: int, first: Sequence[Params], batch: int) -> Optuna:
    """CMA-ES of optuna from the start point, with the first step and the population of the others."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.CmaEsSampler(
            x0=dict(problem.space.start()), sigma0=1 / 6, seed=seed, popsize=batch
        )
    return Optuna(problem.space, first, sampler)


@cache
def _smollm2() -> Any:
    """The embedded model, loaded once."""
    from llmevo.llm.local import LocalChat

    return LocalChat()


Build = Callable[[Problem], Any]


def _plain(name: str) -> Build:
    return lambda problem: make(name, problem.space, "maximize")


def _hybrid(client: Callable[[Problem], Any]) -> Build:
    """The hybrid as a genome gets it, with another model."""
    return lambda problem: make("hybrid", problem.space, "maximize", client=client(problem))


def _placebo(problem: Problem) -> Any:
    return make("hybrid", problem.space, "maximize", guest="placebo")


def _warmstart(client: Callable[[Problem], Any]) -> Build:
    """The model is asked once, for the first points."""
    return lambda problem: make("warmstart", problem.space, "maximize", client=client(problem))


OURS: dict[str, Build] = {
    "random": _plain("random"),
    "sobol": _plain("sobol"),
    "ga": _plain("ga"),
    "cma": _plain("cma"),
    "topk_mean": _plain("topk_mean"),
    "hybrid+placebo": _placebo,
    "hybrid+random": _hybrid(random_json),
    "hybrid+fair": _hybrid(lambda problem: guesser(problem, FAIR_NOISE, FAIR_CHOICE)),
    "hybrid+good": _hybrid(lambda problem: guesser(problem, GOOD_NOISE, GOOD_CHOICE)),
    "warmstart+random": _warmstart(random_json),
    "warmstart+fair": _warmstart(lambda problem: guesser(problem, FAIR_NOISE, FAIR_CHOICE)),
    "hybrid+smollm2": _hybrid(lambda problem: _smollm2()),
}
_LIBRARIES: dict[str, Callable[[Problem, int, Sequence[Params], int], Search]] = {
    "optuna-tpe": optuna_tpe,
    "optuna-cma": optuna_cma,
    "cmaes": cmaes_by_hand,
    "pycma": pycma,
}
_CONTINUOUS_ONLY = ("optuna-cma", "cmaes", "pycma")
SLOW = ("hybrid+smollm2",)


def arms() -> list[str]:
    """Every arm, those of a real model last."""
    return [name for name in OURS if name not in SLOW] + list(_LIBRARIES) + list(SLOW)


def fits(arm: str, problem: Problem) -> bool:
    """Whether an arm can search the problem's space at all."""
    return arm not in _CONTINUOUS_ONLY or all(gene.count is None for gene in problem.space.genes.values())


def search(arm: str, problem: Problem, seed: int, first: Sequence[Params], batch: int) -> Search:
    """The arm at the start of a run."""
    if arm in OURS:
        return Ours(problem.space, seed, first, OURS[arm](problem))
    return _LIBRARIES[arm](problem, seed, first, batch)
