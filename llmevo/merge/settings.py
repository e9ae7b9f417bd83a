"""The numbers of a recipe apart from its structure, so that the structure is resolved only once.

A search writes the same recipe again and again with other numbers. Here a recipe is split into a key, equal
for recipes that differ in the numbers of float parameters alone, and those numbers in order. A `Setting` says
which of them a tensor's parameter is made of. The rules are mergekit's `evaluate_setting`; a test compares
the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, final

# A number's place in the list of numbers, or two places and the share of the second.
Reading = tuple[int, int, float]


class UnknownFormError(Exception):
    """A recipe of a form that is left to mergekit's planner; never leaves this package."""


@final
@dataclass(frozen=True, slots=True)
class Setting:
    """One parameter's setting: a number, a gradient over the layers, or filters with one of these each.

    Args:
        numbers: Places of the numbers; more than one is a gradient.
        choices: Filters (None for any tensor) and their settings; then `numbers` is empty.
    """

    numbers: tuple[int, ...] = ()
    choices: tuple[tuple[str | None, Setting], ...] = ()

    def read(self, tensor: str, position: float) -> Reading | None:
        """Return what the setting is for a tensor at a position of its slice; None if it says nothing."""
        if self.choices:
            for pattern, inner in self.choices:
                if pattern is None or pattern == "*" or (tensor and pattern in tensor):
                    return inner.read(tensor, position)
            return None
        if not self.numbers:
            return None
        scaled = position * (len(self.numbers) - 1)
        low = int(scaled)
        high = min(len(self.numbers) - 1, low + 1)
        return self.numbers[low], self.numbers[high], scaled - low


Scope = Mapping[str, Setting | Any]


@final
@dataclass(slots=True)
class Split:
    """A recipe, split.

    Args:
        key: Equal for recipes of one structure.
        numbers: The numbers of float parameters, in order.
        shared: The recipe's own parameters.
        slices: For each output slice: its parameters, and those of its sources in order.
    """

    key: str = ""
    numbers: list[float] = field(default_factory=list)
    shared: Scope = field(default_factory=dict)
    slices: list[tuple[Scope, list[Scope]]] = field(default_factory=list)


def split(recipe: Mapping[str, Any], floats: Collection[str]) -> Split:
    """Split a recipe.

    Args:
        recipe: A mergekit configuration as plain data.
        floats: The method's parameters whose values are floats; all others belong to the structure.

    Raises:
        UnknownFormError: If the recipe has `modules`, or a setting that is no number, gradient or filter.
    """
    if not (isinstance(recipe.get("models"), list) ^ isinstance(recipe.get("slices"), list)):
        raise UnknownFormError("neither models nor slices")
    result = Split()

    def scope(parameters: Any) -> tuple[dict[str, Any], Any]:
        found: dict[str, Any] = {}
        form: dict[str, Any] = {}
        # Sorted, since recipes of one key must have their numbers in one order.
        for name, value in sorted((parameters or {}).items()):
            if name in floats:
                found[name], form[name] = _setting(value, result.numbers)
            elif isinstance(value, bool | int | float | str):
                found[name] = form[name] = value
            else:
                raise UnknownFormError(f"`{name}` is {value!r}")
        return found, form

    def strip(part: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        found, form = scope(part.get("parameters"))
        rest = {key: value for key, value in part.items() if key not in ("parameters", "sources")}
        return found, {**rest, "parameters": form}

    top = {k: v for k, v in recipe.items() if k not in ("models", "slices", "parameters")}
    result.shared, form = scope(recipe.get("parameters"))
    parts = recipe.get("slices") or [{"sources": recipe["models"]}]
    forms = []
    for part in parts:
        own, own_form = strip(part)
        sources = [strip(source) for source in part["sources"]]
        result.slices.append((own, [found for found, _ in sources]))
        forms.append([own_form, [shape for _, shape in sources]])
    result.key = json.dumps([top, form, forms, "models" in recipe], sort_keys=True, default=str)
    return result


def _setting(value: Any, numbers: list[float]) -> tuple[Setting, Any]:
    """Return a setting, and its form without numbers; append its numbers."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        choices, forms = [], []
        for part in value:
            if not part.keys() <= {"filter", "value"} or "value" not in part:
                raise UnknownFormError(f"conditional setting {part}")
            inner, form = _setting(part["value"], numbers)
            if inner.choices:
                raise UnknownFormError("a condition inside a condition")
            pattern = part.get("filter")
            choices.append((pattern, inner))
            forms.append([pattern, form])
        return Setting(choices=tuple(choices)), forms
    entries = value if isinstance(value, list) else [value]
    if any(isinstance(entry, bool) or not isinstance(entry, int | float) for entry in entries):
        raise UnknownFormError(f"setting {value!r}")
    start = len(numbers)
    numbers += [float(entry) for entry in entries]
    return Setting(tuple(range(start, len(numbers)))), len(entries)


def lookup(
    name: str, scopes: list[Scope], tensor: str, position: float, validate: Callable[[Any], Any]
) -> Reading | Any | None:
    """Return the first setting that says something: a `Reading`, or a validated constant; None if none does.

    Args:
        name: Of the parameter.
        scopes: From the most specific to the most general.
        tensor: The name that filters see.
        position: In the slice.
        validate: mergekit's check of the parameter's values, for those that are not floats.
    """
    from mergekit.config import evaluate_setting

    for scope in scopes:
        if name not in scope:
            continue
        value = scope[name]
        found = (
            value.read(tensor, position)
            if isinstance(value, Setting)
            else evaluate_setting(tensor, value, position, validate=validate)
        )
        if found is not None:
            return found
    return None
