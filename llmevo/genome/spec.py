"""How a genome file says that a parameter varies: `{float: [0, 1]}`, `{int: [1, 8]}`, `{choice: [a, b]}`."""

from __future__ import annotations

import math
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from llmevo.space import Categorical, Float, Gene, Int, Value


class Spec(BaseModel):
    """A part of the genome file: frozen, unknown keys refused, no NaN and no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _scalar(value: Any) -> Any:
    """Refuse lists and mappings once, instead of once for each kind of scalar."""
    if isinstance(value, (list, dict)):
        raise ValueError(
            "must be a value, or a gene like {float: [0, 1]}, {int: [1, 8]} or {choice: [a, b]}, but got "
            f"{str(value)[:80]}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be a finite number, but got {value}")
    return value


def _fixed(value: Any) -> Any:
    """As `_scalar`, where nothing at all is no value."""
    if value is None:
        raise ValueError("must be a value or a gene, but got null; remove the key for mergekit's default")
    return _scalar(value)


class FloatGene(Spec):
    """`{float: [low, high], log: false, step: null, init: null, grouped: null}`.

    Attributes:
        bounds: Smallest and largest value, both included; `float` in the file.
        log: As in `space.Float`.
        step: As in `space.Float`.
        init: As in `space.Float`.
        grouped: Whether each layer group and filter has a value of its own; None for yes where the
            parameter is `weight`, `density` or `t`, and no otherwise.
    """

    bounds: tuple[float, float] = Field(alias="float")
    log: bool = False
    step: Annotated[float, Field(gt=0)] | None = None
    init: float | None = None
    grouped: bool | None = None

    def gene(self) -> Gene:
        """The gene of the space that this describes."""
        return Float(*self.bounds, log=self.log, step=self.step, init=self.init)

    @model_validator(mode="after")
    def _is_a_gene(self) -> FloatGene:
        self.gene()
        return self


class IntGene(Spec):
    """`{int: [low, high], log: false, step: 1, init: null, grouped: null}`; see FloatGene."""

    bounds: tuple[int, int] = Field(alias="int")
    log: bool = False
    step: Annotated[int, Field(ge=1)] = 1
    init: int | None = None
    grouped: bool | None = None

    def gene(self) -> Gene:
        """The gene of the space that this describes."""
        return Int(*self.bounds, log=self.log, step=self.step, init=self.init)

    @model_validator(mode="after")
    def _is_a_gene(self) -> IntGene:
        self.gene()
        return self


class ChoiceGene(Spec):
    """`{choice: [a, b, c], ordered: false, init: null, grouped: null}`; see FloatGene."""

    choices: Annotated[list[Annotated[Value, BeforeValidator(_scalar)]], Field(min_length=1)] = Field(
        alias="choice"
    )
    ordered: bool = False
    init: Value = None
    grouped: bool | None = None

    def gene(self) -> Gene:
        """The gene of the space that this describes."""
        return Categorical(*self.choices, ordered=self.ordered, init=self.init)

    @model_validator(mode="after")
    def _is_a_gene(self) -> ChoiceGene:
        self.gene()
        return self


GeneSpec: TypeAlias = FloatGene | IntGene | ChoiceGene
Fixed: TypeAlias = Annotated[bool | int | float | str, BeforeValidator(_fixed)]


def _kind(value: Any) -> str:
    """Which member of the unions below `value` is meant to be."""
    for model, key in ((FloatGene, "float"), (IntGene, "int"), (ChoiceGene, "choice")):
        if isinstance(value, model) or (isinstance(value, dict) and key in value):
            return f"<{key}>"
    return "<models>" if isinstance(value, dict) else "<fixed>"


def setting_kind(value: Any) -> str:
    """As `_kind`, where a mapping that is no gene is a wrong fixed value."""
    kind = _kind(value)
    return "<fixed>" if kind == "<models>" else kind


Setting: TypeAlias = Annotated[
    Annotated[FloatGene, Tag("<float>")]
    | Annotated[IntGene, Tag("<int>")]
    | Annotated[ChoiceGene, Tag("<choice>")]
    | Annotated[Fixed, Tag("<fixed>")],
    Discriminator(setting_kind),
]
ModelSetting: TypeAlias = Annotated[
    Annotated[FloatGene, Tag("<float>")]
    | Annotated[IntGene, Tag("<int>")]
    | Annotated[ChoiceGene, Tag("<choice>")]
    | Annotated[dict[str, Setting], Tag("<models>")]
    | Annotated[Fixed, Tag("<fixed>")],
    Discriminator(_kind),
]
Warm: TypeAlias = Annotated[
    Annotated[str, Tag("<path>")] | Annotated[dict[str, Any], Tag("<recipe>")],
    Discriminator(lambda value: "<recipe>" if isinstance(value, dict) else "<path>"),
]
Methods: TypeAlias = Annotated[
    Annotated[str, Tag("<one>")] | Annotated[list[str], Field(min_length=1), Tag("<many>")],
    Discriminator(lambda value: "<many>" if isinstance(value, list) else "<one>"),
]
