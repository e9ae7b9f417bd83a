"""What one hyperparameter of `train` may be, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """What a hyperparameter may be."""

    kind: Literal["int", "float", "choice", "bool"]
    low: float = 0.0
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False

    def __str__(self) -> str:
        if self.kind == "choice":
            return "one of " + ", ".join(self.choices)
        if self.kind == "bool":
            return "true or false"
        what = "a whole number" if self.kind == "int" else "a number"
        what += f" {'>' if self.open_low else '>='} {self.low:g}"
        if self.high < float("inf"):
            what += f" and {'<' if self.open_high else '<='} {self.high:g}"
        return what + (", or null" if self.optional else "")

    def holds(self, value: object) -> bool:
        """Whether `value` is allowed."""
        if value is None:
            return self.optional
        if self.kind == "choice":
            return isinstance(value, str) and value in self.choices
        if self.kind == "bool" or isinstance(value, bool):
            return self.kind == "bool" and isinstance(value, bool)
        if not isinstance(value, (int, float)) or (self.kind == "int" and int(value) != value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)
