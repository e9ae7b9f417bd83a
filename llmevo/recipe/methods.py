"""What each merge method takes, read from mergekit's own registry, and in which range it is searched.

Importing mergekit's methods imports torch, so it happens when a method is looked up, not before.

The default ranges, with the reason for each (`parameters:` in the genome overrides any of them):

- `weight`: [0, 1.5], or [-1, 1.5] with `allow_negative_weights`. mergekit-evolve sets no upper bound; a
  search needs one, and task vectors scaled by more than 1.5 leave the region in which adding them works.
  It starts at 1/n for methods that average models, and at max(1/n, 0.3) where task vectors are
  added up: they are nearly orthogonal, so that a sum needs no division by n, and the scale found best for
  sums is 0.3 to 0.5 (https://arxiv.org/abs/2212.04089).
- `density`: [0.05, 1] from 0.5. mergekit-evolve starts at 1, the edge at which half of all samples are
  clamped; below 0.05 most small tensors lose everything.
- `t` of slerp: [0, 1] from 0.5. `t` of nearswap is a distance between weights: [1e-5, 1e-2], logarithmic.
- `select_topk` of sce: [0.05, 1] from 0.5, as density.
- `r` and `alpha` of ramplus_tl: [0, 1] from mergekit's defaults.
- `filter_wise` of model_stock: both.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, final

from pydantic import ValidationError

from llmevo.errors import GenomeError
from llmevo.genome.spec import ChoiceGene, FloatGene, IntGene
from llmevo.space import Categorical, Float, Gene

# What mergekit-evolve searches, in the order of its arrays' last axis (evo/genome.py, METHOD_PARAM_MAPS).
EVOLVE: dict[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "slerp": ("t",),
}
GROUPED = frozenset({"weight", "density", "t"})
# Methods whose result is a mean of the models themselves, not a sum of task vectors.
AVERAGES = frozenset({"linear", "multislerp", "nuslerp", "slerp"})


@final
@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Args:
        name: As in a recipe.
        scope: `shared`, `input` (each model has one) or `non_base` (each model but the base).
        spec: mergekit's `ParameterSpec`, which validates values.
    """

    name: str
    scope: Literal["shared", "input", "non_base"]
    spec: Any

    def check(self, value: object, where: str) -> Any:
        """`value` as mergekit takes it.

        Raises:
            GenomeError: mergekit would refuse it.
        """
        try:
            return self.spec.validate(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].replace("Input should be", "must be")
            raise GenomeError(f"`{where}` {reason}, but got {value!r}.") from None


@final
@dataclass(frozen=True)
class Method:
    """One merge method.

    Args:
        name: As in a recipe.
        parameters: By name; those without effect on the result are left out.
        contract: mergekit's `InputContract`.
        consensus: Whether signs are elected element by element, as in TIES.
    """

    name: str
    parameters: dict[str, Parameter]
    contract: Any
    consensus: bool

    @property
    def base(self) -> str:
        """`required`, `optional`, `forbidden` or `ignored`."""
        return str(self.contract.base.value)

    def uses_base(self, base: str | None) -> bool:
        """Whether the recipe names `base` as its base model."""
        return base is not None and self.base in ("required", "optional")

    def default(self, parameter: str, normalize: bool | None) -> Any:
        """The value of a fixed parameter that the genome does not name; None to leave it to mergekit."""
        if parameter in ("normalize", "normalize_weights"):
            if normalize is not None:
                return normalize
            # mergekit-evolve normalises dare_ties, mergekit itself does not; its files must run unchanged.
            return True if self.name == "dare_ties" else self.parameters[parameter].spec.default
        return True if parameter == "int8_mask" else None


@cache
def _registry() -> dict[str, Any]:
    from mergekit.merge_methods import registered_methods

    # passthrough takes one model, so that there is nothing to search.
    return {method.spec.name: method for method in registered_methods() if method.spec.name != "passthrough"}


def names() -> list[str]:
    """Every method that can be searched."""
    return sorted(_registry())


def find(name: str) -> Method:
    """The method called `name`.

    Raises:
        GenomeError: mergekit has no such method, or it takes a single model.
    """
    registry = _registry()
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise GenomeError(
            f"`genome.merge_method` must be one of {', '.join(names())}, but got {name!r}.{hint}"
        )
    found = registry[name]
    idle = set()
    if hasattr(found, "sparsification_method") and found.sparsification_method is None:
        idle = {"density", "rescale", "int8_mask"}
    elif hasattr(found, "consensus_method") and found.consensus_method is None:
        idle = {"int8_mask"}
    parameters = {
        spec.name: Parameter(spec.name, spec.scope.value, spec)
        for spec in found.spec.parameters
        if spec.name not in idle
    }
    consensus = getattr(found, "consensus_method", None) is not None
    return Method(name, parameters, found.spec.contract, consensus)


def default_gene(
    method: str, parameter: str, methods: Collection[str], parents: int, negative: bool
) -> Gene | None:
    """The gene of a parameter that the genome does not name; None if it is not searched by default.

    Args:
        method: The method.
        parameter: One of its parameters.
        methods: All methods of the genome: they share the genes of weights, and so their start.
        parents: Models that are merged, the base not counted.
        negative: Whether weights may be negative.
    """
    if parameter == "weight":
        equal = 1.0 / parents
        init = equal if AVERAGES & set(methods) else max(equal, 0.3)
        return Float(-1.0 if negative else 0.0, 1.5, init=init)
    if parameter in ("density", "select_topk"):
        return Float(0.05, 1.0, init=0.5)
    special: dict[tuple[str, str], Gene] = {
        ("slerp", "t"): Float(0.0, 1.0, init=0.5),
        ("nearswap", "t"): Float(1e-5, 1e-2, log=True, init=1e-3),
        ("ramplus_tl", "r"): Float(0.0, 1.0, init=0.1),
        ("ramplus_tl", "alpha"): Float(0.0, 1.0, init=0.2),
        ("model_stock", "filter_wise"): Categorical(False, True),
    }
    return special.get((method, parameter))


def check_gene(parameter: Parameter, setting: FloatGene | IntGene | ChoiceGene, where: str) -> Gene:
    """The gene that the genome gives a parameter.

    Raises:
        GenomeError: The parameter does not take values of that kind.
    """
    kind = parameter.spec.value_type
    number = kind in (int, float)
    if isinstance(setting, ChoiceGene):
        for choice in setting.choices:
            parameter.check(choice, where)
    elif not number or (kind is int and isinstance(setting, FloatGene)):
        want = "{int: [low, high]}" if kind is int else "{choice: [true, false]}"
        raise GenomeError(f"`{where}` must be a gene of the kind {want}, but got a gene of another kind.")
    return setting.gene()
