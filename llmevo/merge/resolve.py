"""Which parameters each tensor gets: mergekit's planner once for each structure, then arithmetic."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from llmevo.merge import plan
from llmevo.merge.settings import Reading, Scope, Split, UnknownFormError, lookup, split

if TYPE_CHECKING:
    import torch

    from llmevo.merge.adapters import Factor
    from llmevo.merge.weights import Weights

Numbers = NDArray[np.float64]

# Structures kept: a run has one for each merge method, and the references' and warm starts' own.
_KEPT = 32


@final
@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the merged model.

    Args:
        name: Of the output.
        models: The models that it is merged from, in mergekit's order.
        tensors: What is read of each of them.
        inputs: The names of these.
        base: Index of the base model among them; None without one.
        constants: Parameters that are no floats (`normalize`, say), resolved.
        factors: What adapters add to each of `tensors`; None where that is nothing.
    """

    name: str
    models: tuple[Any, ...]
    tensors: tuple[torch.Tensor, ...]
    inputs: tuple[str, ...]
    base: int | None
    constants: Mapping[str, Any]
    factors: tuple[Factor | None, ...]

    def difference(self, model: int) -> torch.Tensor | None:
        """Return what an adapter adds to a model's tensor, in float32; None where that is nothing."""
        factor = self.factors[model]
        return None if factor is None else factor.delta()


@final
@dataclass(frozen=True, slots=True)
class Skeleton:
    """A recipe's structure, resolved.

    Args:
        method: mergekit's name.
        key: Of the structure; see `settings.split`.
        targets: In the order of the checkpoint.
        readings: For each float parameter, indices of two numbers and the share of the second, shaped
            `[targets, 1]` for shared parameters and `[targets, models]` for others. Indices beyond the
            recipe's numbers are into `defaults`.
        defaults: NaN for models that have no such parameter, and the method's default values.
    """

    method: str
    key: str
    targets: tuple[Target, ...]
    readings: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64], Numbers]]
    defaults: tuple[float, ...]

    @property
    def factored(self) -> bool:
        """Whether an adapter's factors are among what is merged."""
        return any(factor is not None for target in self.targets for factor in target.factors)


@final
@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe, resolved.

    Args:
        skeleton: Its structure.
        values: For each float parameter its values, `[targets, 1]` or `[targets, models]`.
    """

    skeleton: Skeleton
    values: Mapping[str, Numbers]


@final
class Resolver:
    """Resolves recipes; the second of one structure costs a fraction of a millisecond.

    Args:
        trace: Plans a recipe, as `plan.trace` does with the other arguments bound.
        models: The weights by mergekit's references.
    """

    def __init__(
        self, trace: Callable[[dict[str, Any]], list[plan.Traced]], models: Mapping[Any, Weights]
    ) -> None:
        self._trace = trace
        self._models = models
        self._kept: OrderedDict[str, Skeleton | None] = OrderedDict()

    def resolve(self, recipe: dict[str, Any]) -> Resolved | None:
        """Return what the recipe's tensors are merged with; None for a recipe that is left to the planner.

        Args:
            recipe: A mergekit configuration as plain data, with the genome's model names. One with numbers
                that are NaN or infinite is left to the planner: NaN stands for a parameter that is not there.

        Raises:
            Exception: Whatever mergekit raises for a structure that it refuses.
        """
        from mergekit import merge_methods

        spec = merge_methods.get(recipe["merge_method"]).spec
        floats = {p.name for p in spec.parameters if p.value_type is float}
        try:
            parts = split(recipe, floats)
            if not all(map(math.isfinite, parts.numbers)):
                return None
            if parts.key not in self._kept:
                self._kept[parts.key] = self._compile(recipe, parts, spec)
        except UnknownFormError:
            return None
        skeleton = self._kept[parts.key]
        self._kept.move_to_end(parts.key)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return None if skeleton is None else _evaluate(skeleton, parts.numbers)

    def _compile(self, recipe: dict[str, Any], parts: Split, spec: Any) -> Skeleton | None:
        traced = self._trace(recipe)
        targets = [target for entry in traced if (target := self._target(entry, parts, spec)) is not None]
        if len(targets) < len(traced) or len({len(target.models) for target in targets}) != 1:
            return None
        defaults = [float("nan")]
        readings = {}
        for parameter in spec.parameters:
            if parameter.value_type is float:
                if not parameter.required:
                    defaults.append(parameter.validate(parameter.default))
                table = [
                    _row(parameter, entry, target, parts, len(parts.numbers), len(defaults) - 1)
                    for entry, target in zip(traced, targets, strict=True)
                ]
                low, high, share = (np.array([[cell[k] for cell in row] for row in table]) for k in range(3))
                readings[parameter.name] = (low.astype(np.int64), high.astype(np.int64), share)
        return Skeleton(recipe["merge_method"], parts.key, tuple(targets), readings, tuple(defaults))

    def _target(self, entry: plan.Traced, parts: Split, spec: Any) -> Target | None:
        """Return a tensor's target; None where mergekit would not just merge tensors that all models have."""
        task = entry.step.task
        reads = {str(load.model): load for load in task.gather_tensors.arguments().values()}
        tensors = [reads[str(model)].execute() for model in task.model_order]
        first = tensors[0]
        if any(
            t is None or not t.is_floating_point() or t.shape != first.shape or not t.is_contiguous()
            for t in tensors
        ):
            return None
        constants = {}
        for parameter in spec.shared_parameters:
            if parameter.value_type is not float:
                scopes = _scopes(entry, parts, None)
                found = lookup(
                    parameter.name, scopes, task.output_weight.name, entry.position, parameter.validate
                )
                constants[parameter.name] = parameter.validate(parameter.default) if found is None else found
        order = list(task.model_order)
        base = order.index(task.base_model) if task.base_model in order else None
        factors = tuple(self._models[m].factors.get(reads[str(m)].group_label()) for m in order)
        return Target(entry.step.name, tuple(order), tuple(tensors), entry.inputs, base, constants, factors)


def _evaluate(skeleton: Skeleton, numbers: Sequence[float]) -> Resolved:
    every = np.array([*numbers, *skeleton.defaults])
    values = {}
    for name, (low, high, share) in skeleton.readings.items():
        # As mergekit interpolates, so that the bits agree.
        values[name] = (1 - share) * every[low] + share * every[high]
    return Resolved(skeleton, values)


def _row(
    parameter: Any, entry: plan.Traced, target: Target, parts: Split, count: int, default: int
) -> list[Reading]:
    """Return the readings of one tensor: one, or one for each model."""
    from mergekit.merge_methods.base import ParameterScope

    def read(model: int | None, tensor: str) -> Reading:
        scopes = _scopes(entry, parts, model)
        found = lookup(parameter.name, scopes, tensor, entry.position, parameter.validate)
        return (count + default, count + default, 0.0) if found is None else found

    if parameter.scope == ParameterScope.SHARED:
        return [read(None, entry.step.task.output_weight.name)]
    nothing = (count, count, 0.0)
    return [
        nothing
        if parameter.scope == ParameterScope.NON_BASE and index == target.base
        else read(index, entry.inputs[index])
        for index in range(len(target.models))
    ]


def _scopes(entry: plan.Traced, parts: Split, model: int | None) -> list[Scope]:
    own, sources = parts.slices[entry.slice]
    # A base model that the recipe does not list stands behind the listed ones, without parameters.
    first = [sources[model]] if model is not None and model < len(sources) else []
    return [*first, own, parts.shared]
