"""The section `train` of a genome file: data, adapter and hyperparameters, each fixed or a gene."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, TypeAlias, final

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from llmevo.errors import SpaceError
from llmevo.genome.rule import Rule
from llmevo.genome.spec import ChoiceGene, Fixed, FloatGene, GeneSpec, IntGene, Spec, setting_kind
from llmevo.space import Categorical, Condition, Float, Gene, Int, Value

FREE_INIT = ("lora", "rslora", "dora", "loraplus", "lorafa")
"""Methods whose first weights may be any of `INITS`."""
_LORA = (*FREE_INIT, "pissa", "adalora", "qlora", "deltalora")
PLAIN = ("randlora", "shira", "loha", "lokr", "miss", "oft", "fourierft", "vblora")
"""Methods of peft that need nothing of ours but a configuration."""
ADAPTERS = (*_LORA, "vera", "ia3", *PLAIN)
INHERITABLE = ("lora", "rslora", "loraplus", "lorafa", "qlora")
"""Adapters that are BA and nothing else, from the first step to the last: what a child can start from."""
TARGETS = ("attn", "mlp", "all-linear")
BASE_INITS = ("pissa", "olora")
"""First weights that are taken out of the base's, so that these change."""
INITS = ("default", "gaussian", "orthogonal", *BASE_INITS)

# Methods of peft that are refused, and why.
_ADDS_TOKENS = "it adds tokens to the input and wraps no module, so that nothing of it reaches the evaluation"
_REFUSED = {
    **dict.fromkeys(("prompt_tuning", "multitask_prompt_tuning", "prefix_tuning", "p_tuning"), _ADDS_TOKENS),
    **dict.fromkeys(("cpt", "cartridge"), _ADDS_TOKENS),
    "adaption_prompt": "it replaces whole attention modules, which cannot be packed",
    "ln_tuning": "it trains copies of the norms' own weights, which `target_modules` does not name",
    "trainable_tokens": "it trains rows of the embeddings, which `target_modules` does not name",
    "xlora": "it mixes adapters that are trained already",
    "poly": "it needs the number of a task with each example",
}

# Which adapters a hyperparameter has an effect on; the others hold for all.
_SCALED = (*_LORA, "randlora", "loha", "lokr")
_USED_BY = {
    "rank": tuple(name for name in ADAPTERS if name not in ("ia3", "fourierft")),
    "alpha": _SCALED,
    "alpha_over_rank": _SCALED,
    "dropout": (*(name for name in _LORA if name != "deltalora"), "vera", "randlora", "miss", "vblora"),
    "init": (*FREE_INIT, "qlora", "deltalora"),
    "loraplus_ratio": ("loraplus",),
    "delta_lambda": ("deltalora",),
    "delta_start": ("deltalora",),
}
_PREFIX = "train."


def _kind(value: Any) -> str:
    return "<list>" if isinstance(value, list) else setting_kind(value)


_Setting: TypeAlias = Annotated[
    Annotated[FloatGene, Tag("<float>")]
    | Annotated[IntGene, Tag("<int>")]
    | Annotated[ChoiceGene, Tag("<choice>")]
    | Annotated[list[str], Field(min_length=1), Tag("<list>")]
    | Annotated[Fixed | None, Tag("<fixed>")],
    Discriminator(_kind),
]


_RULES = {
    "adapter": Rule("choice", choices=ADAPTERS),
    "rank": Rule("int", 1),
    "alpha": Rule("float", 0, open_low=True, optional=True),
    "alpha_over_rank": Rule("float", 0, open_low=True, optional=True),
    "dropout": Rule("float", 0, 1, open_high=True),
    "init": Rule("choice", choices=INITS),
    "target_modules": Rule("choice", choices=TARGETS),
    "layers": Rule("int", 1, optional=True),
    "learning_rate": Rule("float", 0, 10, open_low=True),
    "schedule": Rule("choice", choices=("constant", "wsd")),
    "warmup": Rule("float", 0, 1, open_high=True),
    "decay": Rule("float", 0, 1),
    "weight_decay": Rule("float", 0),
    "batch_size": Rule("int", 1),
    "epochs": Rule("float", 0, open_low=True, optional=True),
    "tokens": Rule("int", 1, optional=True),
    "accumulation": Rule("int", 1),
    "clip": Rule("float", 0),
    "loraplus_ratio": Rule("float", 0, open_low=True),
    "delta_lambda": Rule("float", 0, open_low=True),
    "delta_start": Rule("float", 0, 1, open_high=True),
    "checkpointing": Rule("bool"),
}


def _part(value: Any) -> Any:
    if not isinstance(value, str) and not (isinstance(value, float) and 0 < value < 1):
        raise ValueError(f"must be a file, or a share > 0 and < 1, but got {value!r}; change it")
    return value


_Part: TypeAlias = Annotated[str | float, BeforeValidator(_part)]


class DataSpec(Spec):
    """The examples; `data: SOURCE` is short for `data: {train: SOURCE}`.

    A source is a JSONL or parquet file, or a data set for `datasets`: `NAME` or `NAME[split]`, where NAME is
    a folder that `datasets` wrote or can read, or a name on the hub. Each row has `text`, or `prompt` and
    `completion`, or `messages` (a list of `role` and `content`). Of a text every token is learnt, of the
    others the completion and the assistant's turns. With a head for classes or values, it has `text`,
    perhaps `text_pair`, and `label`.

    Attributes:
        train: Source of the examples to learn from.
        validation: Source of the search's examples, or the share of `train` that is taken for them.
        test: Source of the held-out examples, which are read once, at the end; or their share of `train`.
        general: Source of examples of another kind, which are never trained on: they show whether the model
            forgets what it could do. None for none.
        general_test: Source of its held-out examples, or the share of `general` that is taken for them.
        columns: From the names above to the source's own, such as `{prompt: document, completion: summary}`.
        max_length: Longest example in tokens; None for the model's context.
        too_long: What becomes of longer ones: `error`, `drop` them, or `cut` them off.
    """

    train: str
    validation: _Part = 0.1
    test: _Part = 0.1
    general: str | None = None
    general_test: _Part = 0.5
    columns: dict[Literal["text", "text_pair", "label", "prompt", "completion", "messages"], str] = Field(
        default_factory=dict
    )
    max_length: Annotated[int, Field(ge=2)] | None = None
    too_long: Literal["error", "drop", "cut"] = "error"

    @model_validator(mode="after")
    def _shares(self) -> DataSpec:
        shares = [share for share in (self.validation, self.test) if isinstance(share, float)]
        if sum(shares) >= 1:
            raise ValueError(
                f"`validation` and `test` must leave something of `train`, but their shares are {shares}; "
                "make them smaller"
            )
        return self


def _data(value: Any) -> Any:
    return {"train": value} if isinstance(value, str) else value


@final
@dataclass(frozen=True, slots=True)
class TrainSettings:
    """The hyperparameters of one training: `TrainSpec` with every gene decided; see there."""

    adapter: str = "lora"
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    init: str = "default"
    target_modules: str | tuple[str, ...] = "all-linear"
    layers: int | None = None
    learning_rate: float = 3e-4
    schedule: str = "constant"
    warmup: float = 0.05
    decay: float = 0.2
    weight_decay: float = 0.0
    batch_size: int = 16
    epochs: float = 1.0
    tokens: int | None = None
    accumulation: int = 1
    clip: float = 1.0
    loraplus_ratio: float = 16.0
    delta_lambda: float = 2.0
    delta_start: float = 0.1
    checkpointing: bool = False

    @property
    def starts_from_base(self) -> bool:
        """Whether the adapter's first weights are taken out of the base's."""
        return self.adapter == "pissa" or (self.adapter in FREE_INIT and self.init in BASE_INITS)

    def held(self) -> dict[str, Any]:
        """Those that had an effect, by name: not `epochs` beside a budget in tokens, say."""
        idle = {name for name, users in _USED_BY.items() if self.adapter not in users}
        idle |= {"decay"} if self.schedule != "wsd" else set()
        idle |= {"epochs"} if self.tokens is not None else {"tokens"}
        idle |= {"layers"} if self.layers is None else set()
        return {name: value for name, value in asdict(self).items() if name not in idle}


DEFAULTS = TrainSettings()
_STARTS = {"alpha_over_rank": DEFAULTS.alpha / DEFAULTS.rank}  # of settings that stand for others


class TrainSpec(Spec):
    """How candidates are trained. The defaults are those that public comparisons of LoRA settings favour.

    Attributes:
        data: The examples.
        head: What the model says of a text: `lm` goes on with it or answers it, `classification` gives one
            of the labels, `regression` a number. A head is trained with the adapter.
        each_epoch: Whether `tasks` that are measured on the data's own examples are measured after each
            epoch, too, on the validation examples; kept with the trial.
        max_new_tokens: Longest answer for metrics that read one; None for the longest in the data.
        adapter: One of `ADAPTERS`.
        rank: Of the adapter; adalora's is the mean rank at the end, oft's the side of its blocks.
        alpha: The adapter's scale is alpha / rank (rslora: alpha / sqrt(rank)). None for 32, or what
            `alpha_over_rank` says.
        alpha_over_rank: In place of `alpha`: alpha = this * rank.
        dropout: On the adapter's input, while training.
        init: The adapter's first weights: peft's `default` (A drawn, B zero), `gaussian`, `orthogonal`, or
            out of the base's by `pissa` or `olora`.
        target_modules: `attn`, `mlp`, `all-linear`, or a list of ends of module names.
        layers: Only the last so many layers; None for all.
        learning_rate: AdamW's, at its highest.
        schedule: `constant`, or `wsd` (constant, then linearly to zero); both after the warm-up.
        warmup: Share of the steps in which the learning rate rises linearly.
        decay: wsd only: share of the steps in which it falls.
        weight_decay: AdamW's, on the adapter.
        batch_size: Examples per optimizer step.
        epochs: Passes over the training examples; fractions are allowed. None for 1, or what `tokens` says.
        tokens: Tokens to train on, exactly, in place of `epochs`.
        accumulation: Parts in which a batch goes through the model; the result is the same, the memory less.
        clip: Largest norm of the gradient; 0 for no limit.
        loraplus_ratio: loraplus only: learning rate of B over that of A.
        delta_lambda: deltalora only: how much of the adapter's change the base weights take.
        delta_start: deltalora only: share of the steps before they take any.
        checkpointing: Recompute activations in the backward pass: less memory, about half more time.
        together: How many candidates of a batch are trained at once, in a stack; `auto` for what is measured
            at the start to be fastest. It changes results by rounding only.
    """

    data: Annotated[DataSpec, BeforeValidator(_data)]
    head: Literal["lm", "classification", "regression"] = "lm"
    each_epoch: bool = False
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    adapter: _Setting = DEFAULTS.adapter
    rank: _Setting = DEFAULTS.rank
    alpha: _Setting = None
    alpha_over_rank: _Setting = None
    dropout: _Setting = DEFAULTS.dropout
    init: _Setting = DEFAULTS.init
    target_modules: _Setting = "all-linear"
    layers: _Setting = None
    learning_rate: _Setting = DEFAULTS.learning_rate
    schedule: _Setting = DEFAULTS.schedule
    warmup: _Setting = DEFAULTS.warmup
    decay: _Setting = DEFAULTS.decay
    weight_decay: _Setting = DEFAULTS.weight_decay
    batch_size: _Setting = DEFAULTS.batch_size
    epochs: _Setting = None
    tokens: _Setting = None
    accumulation: _Setting = DEFAULTS.accumulation
    clip: _Setting = DEFAULTS.clip
    loraplus_ratio: _Setting = DEFAULTS.loraplus_ratio
    delta_lambda: _Setting = DEFAULTS.delta_lambda
    delta_start: _Setting = DEFAULTS.delta_start
    checkpointing: _Setting = DEFAULTS.checkpointing
    together: Annotated[
        Literal["auto", "off"] | Annotated[int, Field(ge=2)],
        BeforeValidator(lambda value: "off" if value is False else value),  # as YAML has it without quotes
    ] = "auto"

    @model_validator(mode="after")
    def _rules(self) -> TrainSpec:
        for name, rule in _RULES.items():
            setting = getattr(self, name)
            if isinstance(setting, list):
                if name != "target_modules":
                    raise ValueError(f"`{name}` must be {rule}, but got the list {setting}; give one value")
                continue
            for value in values_of(setting):
                if name == "adapter" and value in _REFUSED:
                    raise ValueError(f"`adapter` must not be {value}: {_REFUSED[value]}; change it")
                if not rule.holds(value):
                    raise ValueError(f"`{name}` must be {rule}, but got {value!r}; change it")
        if self.tokens is not None and self.epochs is not None:
            raise ValueError("`epochs` and `tokens` exclude each other; remove one")
        if self.alpha is not None and self.alpha_over_rank is not None:
            raise ValueError("`alpha` and `alpha_over_rank` exclude each other; remove one")
        largest, smallest = max(values_of(self.accumulation)), min(values_of(self.batch_size))
        if largest > smallest:
            raise ValueError(
                f"`accumulation` must be <= `batch_size`, but they may be {largest} and {smallest}; a batch "
                "has no more parts than examples"
            )
        self._check_effects()
        self._check_init()
        return self

    def _check_init(self) -> None:
        inits, adapters = values_of(self.init), values_of(self.adapter)
        fixed = [name for name in adapters if name in _USED_BY["init"] and name not in FREE_INIT]
        if fixed and not set(inits).isdisjoint(BASE_INITS):
            raise ValueError(
                f"`init` must not be {' or '.join(BASE_INITS)} with the adapter {' or '.join(fixed)}, which "
                "does not take its first weights out of the base's; remove one"
            )
        step = self.rank.step if isinstance(self.rank, IntGene) else 2
        if "orthogonal" in inits and any(rank % 2 for rank in (*values_of(self.rank), step)):
            raise ValueError("`rank` must be even with `init: orthogonal`, but may be odd; change one")

    def _check_effects(self) -> None:
        adapters = values_of(self.adapter)
        for name, users in _USED_BY.items():
            if isinstance(getattr(self, name), GeneSpec) and not set(adapters) & set(users):
                raise ValueError(
                    f"`{name}` has no effect with the adapter {' or '.join(adapters)}, so it must not be a "
                    "gene; remove it"
                )

    def genes(self) -> dict[str, Gene]:
        """The genes, `train.rank` and so on. Without an `init` of its own, a gene starts at the default."""
        named = {name: getattr(self, name) for name in _RULES}
        return {
            _PREFIX + name: _starting(setting, _STARTS.get(name) or getattr(DEFAULTS, name))
            for name, setting in named.items()
            if isinstance(setting, GeneSpec)
        }

    def conditions(self) -> dict[str, Condition]:
        """Which genes count for some adapters only, where the adapter is a gene."""
        if not isinstance(self.adapter, ChoiceGene):
            return {}
        choices = self.adapter.choices
        return {
            _PREFIX + name: Condition(_PREFIX + "adapter", tuple(c for c in choices if c in users))
            for name, users in _USED_BY.items()
            if isinstance(getattr(self, name), GeneSpec) and not set(choices) <= set(users)
        }

    def settings(self, params: Mapping[str, Value]) -> TrainSettings:
        """The hyperparameters at a point of the space; genes of other stages are passed over."""
        chosen: dict[str, Any] = {}
        for field in fields(TrainSettings):
            setting = getattr(self, field.name)
            if isinstance(setting, GeneSpec):
                setting = params.get(_PREFIX + field.name)
            if isinstance(setting, list):
                setting = tuple(setting)
            default = getattr(DEFAULTS, field.name)
            if setting is not None:  # None: no limit, or a gene that the adapter does not have
                chosen[field.name] = float(setting) if isinstance(default, float) else setting
        ratio: Any = self.alpha_over_rank
        if isinstance(ratio, GeneSpec):
            ratio = params.get(_PREFIX + "alpha_over_rank")
        if ratio is not None:
            chosen["alpha"] = float(ratio * chosen.get("rank", DEFAULTS.rank))
        return TrainSettings(**chosen)


def values_of(setting: Any) -> list[Any]:
    """What a setting may be: its value, the choices of a gene, or the ends of its range."""
    if isinstance(setting, ChoiceGene):
        return list(setting.choices)
    return list(setting.bounds) if isinstance(setting, (FloatGene, IntGene)) else [setting]


def _starting(setting: GeneSpec, default: Any) -> Gene:
    gene = setting.gene()
    if setting.init is not None:
        return gene
    try:
        if isinstance(gene, Categorical):
            return Categorical(*gene.choices, ordered=gene.ordered, init=default)
        if isinstance(gene, Int):
            return Int(gene.low, gene.high, log=gene.log, step=gene.step, init=default)
        return Float(gene.low, gene.high, log=gene.log, step=gene.step, init=default)
    except SpaceError:  # the default is not in the gene's range, so its own start stands
        return gene
