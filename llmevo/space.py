"""The space that the genes span, with one transform to and from the unit cube.

Proposers that need numbers work in the unit cube; everything else sees params, a dict from gene name to a
plain JSON value. Round trips are exact: `from_unit(to_unit(params)) == params` for every validated params.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt

from llmevo.errors import SpaceError
from llmevo.gene import Categorical as Categorical
from llmevo.gene import Float as Float
from llmevo.gene import Gene as Gene
from llmevo.gene import Int as Int
from llmevo.gene import Value as Value

Params: TypeAlias = dict[str, Value]
Vector: TypeAlias = npt.NDArray[np.float64]


@final
@dataclass(frozen=True, slots=True)
class Condition:
    """A gene counts only while another has one of some values.

    Args:
        gene: Name of the deciding gene; a Categorical that stands before the conditional one.
        values: The choices that switch the conditional gene on.
    """

    gene: str
    values: tuple[Value, ...]


@final
class Space:
    """The ordered genes of a search.

    Args:
        genes: Gene by name, in order.
        conditions: Condition by name of the gene that depends on it. A gene whose condition does not hold
            has the value None in params, and the coordinate of its `init` in the unit cube.

    Raises:
        SpaceError: No gene, or a condition on something that is not an earlier Categorical.
    """

    def __init__(self, genes: Mapping[str, Gene], conditions: Mapping[str, Condition] | None = None) -> None:
        if not genes:
            raise SpaceError("`genes` must not be empty: a search needs something to vary.")
        for name, gene in genes.items():
            if not isinstance(name, str) or not name:
                raise SpaceError(f"`genes` must be named by non-empty strings, but got {name!r}.")
            if not isinstance(gene, (Float, Int, Categorical)):
                raise SpaceError(f"`{name}` must be a Float, Int or Categorical, but got {gene!r}.")
        self.genes: dict[str, Gene] = dict(genes)
        self.conditions: dict[str, Condition] = dict(conditions or {})
        order = list(self.genes)
        for name, condition in self.conditions.items():
            if name not in self.genes:
                raise SpaceError(f"`conditions` names {name!r}, which is not a gene.")
            parent = self.genes.get(condition.gene)
            if not isinstance(parent, Categorical) or order.index(condition.gene) >= order.index(name):
                raise SpaceError(
                    f"the condition of `{name}` must name a Categorical that stands before it, but "
                    f"got {condition.gene!r}."
                )
            for value in condition.values:
                parent.validate(value, condition.gene)

    def __len__(self) -> int:
        return len(self.genes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.genes)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Space)
            and list(self.genes.items()) == list(other.genes.items())
            and self.conditions == other.conditions
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Space({self.genes!r})"

    @property
    def names(self) -> list[str]:
        """Gene names in order."""
        return list(self.genes)

    @property
    def count(self) -> int | None:
        """Number of distinct points if every gene is discrete, ignoring conditions; else None."""
        total = 1
        for gene in self.genes.values():
            if gene.count is None:
                return None
            total *= gene.count
        return total

    def is_active(self, name: str, params: Mapping[str, Value]) -> bool:
        """Whether the condition of gene `name` holds in `params` (true if it has none)."""
        condition = self.conditions.get(name)
        if condition is None:
            return True
        if not self.is_active(condition.gene, params):
            return False
        value = params.get(condition.gene)
        return any(type(value) is type(choice) and value == choice for choice in condition.values)

    def validate(self, params: Mapping[str, object]) -> Params:
        """Return `params` in gene order as they are kept: snapped, inactive genes None.

        Raises:
            SpaceError: An unknown or missing gene, or a value that its gene does not allow.
        """
        for name in params:
            if name not in self.genes:
                near = difflib.get_close_matches(name, self.genes, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise SpaceError(f"`{name}` is not a gene of this space{hint}")
        valid: Params = {}
        for name, gene in self.genes.items():
            if not self.is_active(name, valid):
                valid[name] = None
            elif name not in params:
                raise SpaceError(f"`{name}` is missing: params must give a value to every gene.")
            else:
                valid[name] = gene.validate(params[name], name)
        return valid

    def to_unit(self, params: Mapping[str, Value]) -> Vector:
        """Coordinates, shape (len(self),), of validated params."""
        unit = np.empty(len(self.genes))
        for index, (name, gene) in enumerate(self.genes.items()):
            value = params[name] if self.is_active(name, params) else gene.start
            unit[index] = gene.to_unit(value)  # type: ignore[arg-type]
        return unit

    def from_unit(self, unit: Vector | Sequence[float]) -> Params:
        """Params at the coordinates `unit`, shape (len(self),), clipped to [0, 1].

        Raises:
            SpaceError: Another shape, or a coordinate that is NaN.
        """
        point = np.asarray(unit, dtype=float)
        if point.shape != (len(self.genes),) or np.isnan(point).any():
            raise SpaceError(
                f"`unit` must be {len(self.genes)} numbers without NaN, but got shape "
                f"{point.shape}: {point!r}."
            )
        point = np.clip(point, 0.0, 1.0)
        params: Params = {}
        for coordinate, (name, gene) in zip(point.tolist(), self.genes.items(), strict=True):
            active = self.is_active(name, params)
            params[name] = gene.from_unit(coordinate) if active else None
        return params

    def start(self) -> Params:
        """The point where every gene has its `init`."""
        return self.from_unit(self.start_unit())

    def start_unit(self) -> Vector:
        """Coordinates of `start()`, inactive genes included."""
        return np.array([gene.to_unit(gene.start) for gene in self.genes.values()])  # type: ignore[arg-type]

    def sample(self, rng: np.random.Generator) -> Params:
        """A point drawn uniformly from the unit cube."""
        return self.from_unit(rng.random(len(self.genes)))

    def key(self, params: Mapping[str, Value]) -> str:
        """A string that is equal for equal points, to find duplicates."""
        return json.dumps([params[name] for name in self.genes], separators=(",", ":"))
