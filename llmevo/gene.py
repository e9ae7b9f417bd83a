"""Genes: the three kinds of dimension that a search can have.

Every gene is one coordinate in [0, 1]. The transform follows optuna's `_SearchSpaceTransform`: logarithms
where asked for, and a grid cell of equal width for each value of a discrete gene (half-step widening).
Continuous values are kept to 12 digits, so that the rounding of the transform never shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np

from llmevo.errors import SpaceError

Value: TypeAlias = str | int | float | bool | None

_DIGITS = 12
_INT_MAX = 2**40  # up to here the way to the unit cube and back is exact; from 2**47 on logarithms round


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _cell(unit: float, count: int) -> int:
    """Index of the grid cell that `unit` falls into, out of `count` equal cells."""
    return min(max(int(unit * count), 0), count - 1)


def _check_bounds(gene: str, low: object, high: object) -> None:
    if not (_is_number(low) and _is_number(high)):
        raise SpaceError(f"`low` and `high` of {gene} must be numbers, but got low={low!r}, high={high!r}.")
    if not (math.isfinite(float(low)) and math.isfinite(float(high))):  # type: ignore[arg-type]
        raise SpaceError(f"`low` and `high` of {gene} must be finite, but got {low!r}, {high!r}.")
    if low > high:  # type: ignore[operator]
        raise SpaceError(f"`low <= high` must hold for {gene}, but got low={low!r}, high={high!r}.")


@final
@dataclass(frozen=True, slots=True)
class Float:
    """A real number.

    Args:
        low: Smallest value, included.
        high: Largest value, included.
        log: Search on a logarithmic axis; needs `low > 0` and no `step`.
        step: Only `low, low + step, ...`; `high - low` must be a multiple of it.
        init: Where the search starts; the middle of the axis by default.

    Raises:
        SpaceError: A rule above does not hold.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    init: float | None = None

    def __post_init__(self) -> None:
        _check_bounds("Float", self.low, self.high)
        if not math.isfinite(self.high - self.low):
            raise SpaceError(f"`high - low` of Float must be finite, got {self.low}, {self.high}.")
        if self.log and self.low <= 0:
            raise SpaceError(f"`low > 0` must hold for Float with log=True, but got low={self.low}.")
        if self.step is not None:
            if self.log:
                raise SpaceError("`step` and `log=True` exclude each other in Float; drop one.")
            if not (_is_number(self.step) and self.step > 0):
                raise SpaceError(f"`step > 0` must hold for Float, but got step={self.step!r}.")
            count = (self.high - self.low) / self.step
            if abs(count - round(count)) > 1e-6 * max(1.0, count):
                raise SpaceError(
                    f"`high - low` must be a multiple of `step` in Float, but got low={self.low}, "
                    f"high={self.high}, step={self.step}."
                )
        if self.init is not None:
            object.__setattr__(self, "init", self.validate(self.init, "init"))

    @property
    def count(self) -> int | None:
        """Number of distinct values; None for a continuum."""
        if self.low == self.high:
            return 1
        return None if self.step is None else round((self.high - self.low) / self.step) + 1

    def _snap(self, value: float) -> float:
        """The nearest value that is kept, inside the bounds."""
        if self.step is not None:
            index = round((value - self.low) / self.step)
            value = self.low + index * self.step
        if self.log:
            value = float(f"{value:.{_DIGITS - 1}e}")
        else:
            largest = max(abs(self.low), abs(self.high))
            digits = _DIGITS - math.ceil(math.log10(largest)) if largest > 0 else _DIGITS
            value = round(value, digits)
        return min(max(float(value), float(self.low)), float(self.high))

    def validate(self, value: object, name: str) -> float:
        """Return `value` as it is kept, or raise SpaceError naming the gene `name`."""
        if not _is_number(value) or not math.isfinite(float(value)):  # type: ignore[arg-type]
            raise SpaceError(f"`{name}` must be a finite number, but got {value!r}.")
        number = float(value)  # type: ignore[arg-type]
        slack = 10.0**-_DIGITS * max(abs(self.low), abs(self.high))  # 6 * 0.05 is 0.30000000000000004
        if not self.low - slack <= number <= self.high + slack:
            raise SpaceError(f"`{self.low:g} <= {name} <= {self.high:g}` must hold, but got {number!r}.")
        return self._snap(number)

    def to_unit(self, value: float) -> float:
        """Coordinate in [0, 1] of a validated value."""
        if self.low == self.high:
            return 0.5
        if self.count is not None:
            return (round((value - self.low) / self.step) + 0.5) / self.count  # type: ignore[operator]
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            if low == high:  # bounds that differ by less than their logarithms can tell
                return 0.5
            return min(max((math.log(value) - low) / (high - low), 0.0), 1.0)
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def from_unit(self, unit: float) -> float:
        """Value at the coordinate `unit` in [0, 1]."""
        if self.low == self.high:
            return float(self.low)
        if self.count is not None:
            return self._snap(self.low + _cell(unit, self.count) * self.step)  # type: ignore[operator]
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            return self._snap(math.exp(low + unit * (high - low)))
        return self._snap(self.low + unit * (self.high - self.low))

    @property
    def start(self) -> float:
        """`init`, or the middle of the axis."""
        return self.from_unit(0.5) if self.init is None else self.init


@final
@dataclass(frozen=True, slots=True)
class Int:
    """A whole number; on a logarithmic axis, small values get more room.

    Args:
        low: Smallest value, included.
        high: Largest value, included.
        log: Search on a logarithmic axis; needs `low >= 1` and `step == 1`.
        step: Only `low, low + step, ...`; `high - low` must be a multiple of it.
        init: Where the search starts; the middle of the axis by default.

    Raises:
        SpaceError: A rule above does not hold.
    """

    low: int
    high: int
    log: bool = False
    step: int = 1
    init: int | None = None

    def __post_init__(self) -> None:
        _check_bounds("Int", self.low, self.high)
        for name in ("low", "high", "step"):
            value = getattr(self, name)
            if int(value) != value or abs(value) > _INT_MAX:
                raise SpaceError(f"`{name}` of Int must be a whole number within 2**40, but got {value!r}.")
            object.__setattr__(self, name, int(value))
        if self.step < 1:
            raise SpaceError(f"`step >= 1` must hold for Int, but got step={self.step}.")
        if self.log and (self.low < 1 or self.step != 1):
            raise SpaceError(
                f"`low >= 1` and `step == 1` must hold for Int with log=True, but got "
                f"low={self.low}, step={self.step}."
            )
        if (self.high - self.low) % self.step:
            raise SpaceError(
                f"`high - low` must be a multiple of `step` in Int, but got low={self.low}, "
                f"high={self.high}, step={self.step}."
            )
        if self.init is not None:
            object.__setattr__(self, "init", self.validate(self.init, "init"))

    @property
    def count(self) -> int:
        """Number of distinct values."""
        return (self.high - self.low) // self.step + 1

    def validate(self, value: object, name: str) -> int:
        """Return `value` as an int, or raise SpaceError naming the gene `name`."""
        if not _is_number(value) or not math.isfinite(float(value)) or int(value) != value:  # type: ignore[arg-type, call-overload]
            raise SpaceError(f"`{name}` must be a whole number, but got {value!r}.")
        number: int = int(value)  # type: ignore[call-overload]
        if not self.low <= number <= self.high:
            raise SpaceError(f"`{self.low} <= {name} <= {self.high}` must hold, but got {number}.")
        if (number - self.low) % self.step:
            raise SpaceError(f"`{name}` must be {self.low} plus a multiple of {self.step}, but got {number}.")
        return number

    def _log_axis(self) -> tuple[float, float]:
        return math.log(self.low - 0.5), math.log(self.high + 0.5)

    def to_unit(self, value: int) -> float:
        """Coordinate in [0, 1] of a validated value: the middle of its cell."""
        if self.count == 1:
            return 0.5
        if self.log:
            low, high = self._log_axis()
            return (math.log(value) - low) / (high - low)
        return ((value - self.low) // self.step + 0.5) / self.count

    def from_unit(self, unit: float) -> int:
        """Value whose cell contains the coordinate `unit` in [0, 1]."""
        if self.log and self.count > 1:
            low, high = self._log_axis()
            value: int = round(math.exp(low + unit * (high - low)))
            return min(max(value, self.low), self.high)
        return self.low + _cell(unit, self.count) * self.step

    @property
    def start(self) -> int:
        """`init`, or the middle of the axis."""
        return self.from_unit(0.5) if self.init is None else self.init


@final
@dataclass(frozen=True, slots=True, init=False)
class Categorical:
    """One of several choices.

    Args:
        *choices: Distinct strings, numbers, booleans or None.
        ordered: The choices have an order, so that neighbours are alike.
        init: Where the search starts; the first choice by default.

    Raises:
        SpaceError: No choice, a choice given twice, or one that JSON cannot hold.
    """

    choices: tuple[Value, ...]
    ordered: bool
    init: Value

    def __init__(self, *choices: Value, ordered: bool = False, init: Value = None) -> None:
        if not choices:
            raise SpaceError("`choices` of Categorical must not be empty.")
        for choice in choices:
            if not (choice is None or isinstance(choice, (str, int, float, bool))):
                raise SpaceError(
                    f"`choices` of Categorical must be strings, numbers, booleans or None, but got "
                    f"{choice!r}; name the choice and map the name to the object yourself."
                )
            if isinstance(choice, float) and not math.isfinite(choice):
                raise SpaceError(f"`choices` of Categorical must be finite, but got {choice!r}.")
        keys = [(type(choice), choice) for choice in choices]
        if len(set(keys)) < len(keys):
            raise SpaceError(f"`choices` of Categorical must be distinct, but got {choices!r}.")
        object.__setattr__(self, "choices", tuple(choices))
        object.__setattr__(self, "ordered", ordered)
        object.__setattr__(self, "init", choices[0] if init is None else self.validate(init, "init"))

    @property
    def count(self) -> int:
        """Number of choices."""
        return len(self.choices)

    def index(self, value: object) -> int:
        """Position of a validated value among the choices."""
        # 1 == True == 1.0 in Python, but they are different choices.
        for index, choice in enumerate(self.choices):
            if type(choice) is type(value) and choice == value:
                return index
        raise SpaceError(f"{value!r} is not one of {list(self.choices)!r}.")

    def validate(self, value: object, name: str) -> Value:
        """Return `value`, or raise SpaceError naming the gene `name`."""
        try:
            return self.choices[self.index(value)]
        except SpaceError:
            raise SpaceError(f"`{name}` must be one of {list(self.choices)!r}, but got {value!r}.") from None

    def to_unit(self, value: Value) -> float:
        """Coordinate in [0, 1] of a validated value: the middle of its cell."""
        return (self.index(value) + 0.5) / self.count

    def from_unit(self, unit: float) -> Value:
        """Choice whose cell contains the coordinate `unit` in [0, 1]."""
        return self.choices[_cell(unit, self.count)]

    @property
    def start(self) -> Value:
        """`init`, or the first choice."""
        return self.init


Gene: TypeAlias = Float | Int | Categorical
