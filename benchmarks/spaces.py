"""Problems with a known optimum: what a merge or a LoRA search looks like to a proposer, at no cost.

Every instance has `regret(params) >= 0`, which is 0 at the optimum and 1 at the space's start point, so that
problems can be averaged. A proposer never sees it. It sees a noisy score: the share of `items` questions that
a model with that regret answers, each drawn anew. Optima are shifted, another way for each seed: a proposer
that likes the middle or the corners gains nothing by it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from llmevo.space import Categorical, Condition, Float, Params, Space, Vector

_CHANCE, _SKILL = 0.25, 0.60  # four choices a question; 0.85 is right at the optimum


@dataclass(frozen=True)
class Problem:
    """One instance.

    Args:
        name: Of the family, for instance `rosenbrock-16`.
        space: What may vary.
        optimum: The point with regret 0.
        loss: Any function that is smallest, 0, at the optimum.
        scale: `loss` of the start point.
    """

    name: str
    space: Space
    optimum: Params
    loss: Callable[[Params], float]
    scale: float

    def regret(self, params: Params) -> float:
        """How far from the optimum, in units of the start point's distance; at least 0."""
        return max(self.loss(params), 0.0) / self.scale

    def accuracy(self, params: Params) -> float:
        """Chance that an item is solved: 0.85 at the optimum, 0.55 at the start, falling to 0.25."""
        return _CHANCE + _SKILL / (1.0 + self.regret(params))


def _rng(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(name.encode()), seed])


def _made(name: str, space: Space, optimum: Params, loss: Callable[[Params], float]) -> Problem:
    return Problem(name, space, optimum, loss, loss(space.start()))


def _cube(d: int) -> Space:
    return Space({f"x{index}": Float(0.0, 1.0) for index in range(d)})


def _continuous(name: str, d: int, of: Callable[[Vector], float], optimum: Vector) -> Problem:
    space = _cube(d)

    def loss(params: Params) -> float:
        return of(np.array([float(params[gene]) for gene in space]) - optimum)  # type: ignore[arg-type]

    return _made(name, space, space.from_unit(optimum), loss)


def ellipsoid(name: str, d: int, seed: int) -> Problem:
    """A bowl, rotated at random, whose longest axis is ten times its shortest (condition 100)."""
    rng = _rng(name, seed)
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    weights = 100.0 ** (np.arange(d) / max(d - 1, 1))
    return _continuous(
        name, d, lambda z: float(weights @ (rotation @ z) ** 2), rng.uniform(0.15, 0.85, size=d)
    )


def rastrigin(name: str, d: int, seed: int) -> Problem:
    """A bowl with dents, five to an axis."""

    def value(z: Vector) -> float:
        x = 5.12 * z
        return float((x**2 + 10.0 * (1.0 - np.cos(2.0 * math.pi * x))).sum())

    return _continuous(name, d, value, _rng(name, seed).uniform(0.15, 0.85, size=d))


def rosenbrock(name: str, d: int, seed: int) -> Problem:
    """A long bent valley; the side of the cube is 4."""

    def value(z: Vector) -> float:
        x = 1.0 + 4.0 * z
        return float((100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2).sum())

    return _continuous(name, d, value, _rng(name, seed).uniform(0.15, 0.85, size=d))


def merge(name: str, seed: int, groups: int = 8) -> Problem:
    """Two parents merged into a base: a weight for each parent and group of layers, and a density for each.

    What a weight is worth differs from group to group; both parents in one group are in each other's way,
    and so are neighbouring groups of very different weights. The best weights are often 0 or 1: a parent is
    left out of a group, or taken as it is. A wrong density costs more where the weights are large.
    """
    rng = _rng(name, seed)
    weights = [f"layers_{g}.parent_{p}.weight" for g in range(groups) for p in "ab"]
    densities = [f"parent_{p}.density" for p in "ab"]
    space = Space({gene: Float(0.0, 1.0) for gene in weights} | {gene: Float(0.1, 1.0) for gene in densities})
    count = len(weights)
    matrix = np.diag(10.0 ** rng.uniform(-1.0, 1.0, size=count))  # what each weight matters
    for group in range(groups):
        a, b = 2 * group, 2 * group + 1
        coupling = rng.uniform(0.3, 0.8) * math.sqrt(matrix[a, a] * matrix[b, b])
        matrix[a, b] = matrix[b, a] = coupling
    for place in range(count - 2):
        step = np.zeros(count)
        step[place], step[place + 2] = 1.0, -1.0
        matrix += 0.3 * np.outer(step, step)
    wished = rng.uniform(-0.2, 1.2, size=count)
    root = np.linalg.cholesky(matrix).T
    found = lsq_linear(root, root @ wished, bounds=(0.0, 1.0), tol=1e-14)
    best_density = rng.uniform(0.3, 0.9, size=2)
    lowest = float(((root @ (found.x - wished)) ** 2).sum())

    def loss(params: Params) -> float:
        w = np.array([float(params[gene]) for gene in weights])  # type: ignore[arg-type]
        off = np.array([float(params[gene]) for gene in densities]) - best_density  # type: ignore[arg-type]
        mass = np.array([w[0::2].mean(), w[1::2].mean()])
        return float(((root @ (w - wished)) ** 2).sum()) - lowest + float((6.0 * (0.2 + mass) * off**2).sum())

    unit = [*found.x, *((best_density - 0.1) / 0.9)]
    return _made(name, space, space.from_unit(unit), loss)


_LORA = Space(
    {
        "learning_rate": Float(1e-5, 1e-2, log=True),
        "weight_decay": Float(1e-4, 1e-1, log=True),
        "dropout": Float(0.0, 0.3),
        "warmup": Float(0.0, 0.2),
        "rank": Categorical(4, 8, 16, 32, 64, 128, ordered=True, init=16),
        "alpha": Categorical(8, 16, 32, 64, 128, 256, ordered=True, init=32),
        "batch": Categorical(4, 8, 16, 32, 64, ordered=True, init=16),
        "optimizer": Categorical("adamw", "adafactor", "lion"),
        "schedule": Categorical("cosine", "linear", "constant"),
        "targets": Categorical("attention", "mlp", "all"),
        "variant": Categorical("lora", "lora_plus", "dora"),
        "lr_ratio": Float(2.0, 32.0, log=True),
        "noise": Categorical(False, True),
        "noise_alpha": Float(1.0, 15.0),
    },
    {
        "lr_ratio": Condition("variant", ("lora_plus",)),
        "noise_alpha": Condition("noise", (True,)),
    },
)
_CHOICES = ("optimizer", "schedule", "targets", "variant", "noise")


def lora(name: str, seed: int, *, near: bool) -> Problem:
    """Fine-tuning with LoRA: 4 numbers, 3 grids, 5 choices, and 2 numbers that count under a choice only.

    The best learning rate depends on alpha / rank, on the batch and on the optimizer. With `near` the
    optimum lies around the start point, as when a range was put around a good guess; else it is anywhere.
    """
    rng = _rng(name, seed)
    space = _LORA
    start = space.start_unit()
    drawn = start + rng.normal(0.0, 0.15, len(space)) if near else rng.uniform(0.05, 0.95, len(space))
    goal = space.to_unit(space.from_unit(np.clip(drawn, 0.05, 0.95)))
    index = {gene: place for place, gene in enumerate(space)}
    best = {gene: int(rng.integers(space.genes[gene].count or 1)) for gene in _CHOICES}
    for gene in _CHOICES:
        goal[index[gene]] = (best[gene] + 0.5) / (space.genes[gene].count or 1)
    penalty = {gene: rng.uniform(0.02, 0.2, space.genes[gene].count or 1) for gene in _CHOICES}
    shift = rng.uniform(-0.25, 0.25, 3)  # of the learning rate, by optimizer
    for gene in _CHOICES:
        penalty[gene][best[gene]] = 0.0
    shift[best["optimizer"]] = 0.0
    weight = 10.0 ** rng.uniform(-1.0, 0.5, len(space))

    def loss(params: Params) -> float:
        unit = space.to_unit(params)
        off = unit - goal
        chosen = {gene: int(unit[index[gene]] * (space.genes[gene].count or 1)) for gene in _CHOICES}
        total = sum(float(penalty[gene][chosen[gene]]) for gene in _CHOICES)
        lr = off[index["learning_rate"]] + shift[chosen["optimizer"]]
        lr += 0.4 * (off[index["alpha"]] - off[index["rank"]]) - 0.3 * off[index["batch"]]
        total += 6.0 * lr**2
        for gene in ("weight_decay", "dropout", "warmup", "rank", "alpha", "batch"):
            total += weight[index[gene]] * off[index[gene]] ** 2
        for gene in ("lr_ratio", "noise_alpha"):
            if params[gene] is not None:
                switch = space.conditions[gene].gene
                wanted = goal[index[gene]] if chosen[switch] == best[switch] else 0.5
                total += weight[index[gene]] * (unit[index[gene]] - wanted) ** 2
        return float(total)

    return _made(name, space, space.from_unit(goal), loss)


_FAMILIES = {"ellipsoid": ellipsoid, "rastrigin": rastrigin, "rosenbrock": rosenbrock}
CONTINUOUS = [f"{family}-{d}" for family in _FAMILIES for d in (4, 16, 64)]
SPACES = [*CONTINUOUS, "merge", "lora", "lora-far"]


def problem(name: str, seed: int) -> Problem:
    """The instance `seed` of the family `name`, one of `SPACES` or `<family>-<d>`."""
    if name == "merge":
        return merge(name, seed)
    if name in ("lora", "lora-far"):
        return lora(name, seed, near=name == "lora")
    family, _, d = name.partition("-")
    return _FAMILIES[family](name, int(d), seed)
