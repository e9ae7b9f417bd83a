"""The genome file: what the YAML may say, as pydantic models, and how it is read.

The upper half (`genome`, `tasks`, `limit` and so on) is `mergekit-evolve`'s format, so that its files run
here unchanged. `search`, `llm`, `merge`, `train`, `evaluate`, `run` and `warm_start` are ours. Unknown keys
are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from llmevo.errors import GenomeError
from llmevo.genome import yamltext
from llmevo.genome.explain import explain
from llmevo.genome.llm import LLMSpec as LLMSpec
from llmevo.genome.own import GENERAL_LOSS as GENERAL_LOSS
from llmevo.genome.own import NLL as NLL
from llmevo.genome.own import OWN_TASKS as OWN_TASKS
from llmevo.genome.own import VALIDATION_LOSS as VALIDATION_LOSS
from llmevo.genome.sections import EvaluateSpec as EvaluateSpec
from llmevo.genome.sections import MergeStageSpec as MergeStageSpec
from llmevo.genome.sections import RunSpec as RunSpec
from llmevo.genome.sections import SearchSpec as SearchSpec
from llmevo.genome.spec import Methods, ModelSetting, Spec, Warm
from llmevo.genome.train import BASE_INITS, INHERITABLE, values_of
from llmevo.genome.train import TrainSettings as TrainSettings
from llmevo.genome.train import TrainSpec as TrainSpec


class MergeSpec(Spec):
    """What is merged, and which parts of the recipe may vary.

    The fields up to `smooth` are those of mergekit-evolve's `ModelGenomeDefinition`.

    Attributes:
        models: Parents, in mergekit's syntax `path[@rev][+adapter]`.
        merge_method: A mergekit method, or a list of them, which then is a gene.
        base_model: Needed by methods on task vectors.
        tokenizer_source: As in mergekit.
        layer_granularity: Layers per group with genes of its own; 0 for one group.
        normalize: None for the method's default (as in mergekit-evolve).
        allow_negative_weights: Whether weights may be negative.
        filters: Substrings of tensor names with genes of their own; the rest is one more set.
        smooth: Interpolate between the groups' values instead of stepping.
        parameters: mergekit's parameters, each a fixed value, a gene, or a mapping from a model (its path,
            or its label: the last part of the path) to one of these. What is not named here and shapes
            the merge (weight, density, t, select_topk) is a gene with its default range; everything else
            keeps mergekit's default.
        dtype: In which the merge is computed and exported.
        num_layers: Transformer layers of the models; None to read them from the first model's
            config.json, which needs it on this machine or the network.
    """

    models: Annotated[list[str], Field(min_length=1)]
    merge_method: Methods = "task_arithmetic"
    base_model: str | None = None
    tokenizer_source: str | None = None
    layer_granularity: Annotated[int, Field(ge=0)] = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: list[str] | None = None
    smooth: bool = False
    parameters: dict[str, ModelSetting] = Field(default_factory=dict)
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    num_layers: Annotated[int, Field(ge=1)] | None = None

    @property
    def methods(self) -> list[str]:
        """`merge_method` as a list."""
        return [self.merge_method] if isinstance(self.merge_method, str) else list(self.merge_method)

    @field_validator("models", "filters", "merge_method", mode="after")
    @classmethod
    def _distinct(cls, value: Any) -> Any:
        if isinstance(value, list):
            if len(set(value)) < len(value):
                raise ValueError(f"must not name anything twice, but got {value!r}; remove the double one")
            if not all(value):
                raise ValueError(f"must not hold empty strings, but got {value!r}; remove them")
        return value

    @field_validator("models", "base_model", mode="after")
    @classmethod
    def _references(cls, value: Any) -> Any:
        for reference in value if isinstance(value, list) else [] if value is None else [value]:
            parts = reference.split("+")
            if len(parts) > 2 or any(not part.split("@")[0] or part.count("@") > 1 for part in parts):
                raise ValueError(f"must be `path[@revision][+adapter[@revision]]`, but got {reference!r}")
        return value

    @model_validator(mode="after")
    def _layers(self) -> MergeSpec:
        if self.num_layers and self.layer_granularity and self.num_layers % self.layer_granularity:
            raise ValueError(
                f"`num_layers` must be a multiple of `layer_granularity`, but got {self.num_layers} and "
                f"{self.layer_granularity}; choose a granularity that divides it"
            )
        if self.normalize is not None and "normalize" in self.parameters:
            raise ValueError("`normalize` and `parameters.normalize` exclude each other; remove one")
        return self


class TaskSpec(Spec):
    """One task of the fitness.

    Attributes:
        name: lm-eval's name, that of a local task from `evaluate.task_path`, or one of `own.OWN_TASKS`
            (`validation_loss`, `rouge1` and so on), which are measured on the validation examples of
            `train.data`, and for the held-out table on its test examples.
        weight: Factor of the metric in the score; 0 to have it measured only.
        metric: `metric,filter` as lm-eval prints it, e.g. `acc,none`; our own have one each.
    """

    name: str
    weight: float = 1.0
    metric: str = "acc,none"

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        own = OWN_TASKS.get(value.get("name", "")) if isinstance(value, dict) else None
        if own is not None:
            value = {"metric": own.metric, **value}
            if value["metric"] != own.metric:
                raise ValueError(
                    f"{value['name']} has the metric {own.metric!r}, but got {value['metric']!r}; remove it"
                )
        return value


class Genome(Spec):
    """A whole genome file.

    Attributes:
        genome: What is merged.
        tasks: The fitness: the sum of weight times metric.
        limit: At most this many items of each task, for search and holdout together.
        num_fewshot: Examples in each prompt; None for the task's own number.
        shuffle: Read for mergekit-evolve's sake: the items are always shuffled, once, with the run's seed.
        random_init: Start at a point drawn with `search.seed` instead of at the genes' `init`.
        apply_chat_template: None for yes where the tokenizer has one (mergekit-evolve: always yes).
        fewshot_as_multiturn: None to follow `apply_chat_template`.
        search: Who proposes.
        llm: The language model that proposes.
        merge: How merges are computed.
        train: How each merge, or the one model of `genome.models`, is trained; None for not at all.
        evaluate: How models are scored.
        run: Where the run is kept.
        warm_start: mergekit recipes that are evaluated first: inline, or paths relative to this file,
            which `load` replaces by what they hold.
    """

    genome: MergeSpec
    tasks: Annotated[list[TaskSpec], Field(min_length=1)]
    limit: Annotated[int, Field(ge=1)] | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    shuffle: bool = False
    random_init: bool = False
    apply_chat_template: bool | None = None
    fewshot_as_multiturn: bool | None = None
    search: SearchSpec = SearchSpec()
    llm: LLMSpec = LLMSpec()
    merge: MergeStageSpec = MergeStageSpec()
    train: TrainSpec | None = None
    evaluate: EvaluateSpec = EvaluateSpec()
    run: RunSpec = RunSpec()
    warm_start: list[Warm] = Field(default_factory=list)

    @model_validator(mode="after")
    def _tasks_once(self) -> Genome:
        names = [f"{task.name} ({task.metric})" for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(
                f"`tasks` must not name a task twice with one metric, but got {names}; remove the double one"
            )
        if self.own_tasks and self.train is None:
            raise ValueError(f"`tasks` names {self.own_tasks[0].name}, which needs `train.data`; add `train`")
        idle = self.search.halving.idle(trains=self.train is not None)
        if idle:
            kind, remedy = "items", "add `train`, or remove it"
            if self.train is not None:
                kind, remedy = "tokens", "use `search.halving.tokens`, or remove it"
            raise ValueError(
                f"`search.halving.{idle[0]}` has no effect here, where rungs are {kind}; {remedy}"
            )
        general = any(task.name == GENERAL_LOSS for task in self.tasks)
        if general and (self.train is None or self.train.data.general is None):
            raise ValueError(f"`tasks` names {GENERAL_LOSS}, which needs `train.data.general`; add it")
        return self

    @model_validator(mode="after")
    def _individuals(self) -> Genome:
        if "population" not in (self.search.proposer, self.search.base):
            return self
        if self.search.proposer != "population":
            raise ValueError("`search.base` must not be population, which proposes alone; take ga or cma")
        adapters = [] if self.train is None else values_of(self.train.adapter)
        other = next((kind for kind in adapters if kind not in INHERITABLE), None)
        inits = [] if self.train is None else values_of(self.train.init)
        other = other or next((f"{init}'s" for init in inits if init in BASE_INITS), None)
        if self.train is None or other is not None:
            got = "there is none" if other is None else f"`train.adapter` may be {other}"
            raise ValueError(
                f"`search.proposer: population` needs `train` with adapters that are sums of products "
                f"({', '.join(INHERITABLE)}), but {got}; change it"
            )
        return self

    @model_validator(mode="after")
    def _head_suits(self) -> Genome:
        head = "lm" if self.train is None else self.train.head
        known = sorted(name for name, own in OWN_TASKS.items() if head in own.heads)
        for task in self.tasks:
            own = OWN_TASKS.get(task.name)
            if head not in (("lm",) if own is None else own.heads):
                raise ValueError(
                    f"`tasks` names {task.name}, which a model with `train.head: {head}` cannot do; take "
                    f"some of {', '.join(known)}"
                )
        if head != "lm" and self.alone is None:
            raise ValueError(
                f"`train.head` must be lm where models are merged, but got {head}: a head is no part of any "
                "parent; merge first, then train the merged model in a genome of its own"
            )
        return self

    @property
    def own_tasks(self) -> list[TaskSpec]:
        """The tasks that are measured on the examples of `train.data`."""
        return [task for task in self.tasks if task.name in OWN_TASKS]

    @property
    def alone(self) -> str | None:
        """The one model that is trained without a merge; None where there is something to merge."""
        models = {*self.genome.models, *([self.genome.base_model] if self.genome.base_model else [])}
        return self.genome.models[0] if self.train is not None and len(models) == 1 else None

    @property
    def reruns(self) -> int:
        """How often finalists are trained again: not where that would need ancestors that are gone."""
        return 0 if self.search.proposer == "population" else self.evaluate.reruns

    def for_lm_eval(self) -> Genome | None:
        """The genome with the tasks that lm-eval scores; None if there are none."""
        tasks = [task for task in self.tasks if task.name not in OWN_TASKS]
        search = self.search
        if self.train is not None:  # its rungs would be tokens, not items
            halving = search.halving.model_copy(update={"enabled": False})
            search = search.model_copy(update={"halving": halving})
        return self.model_copy(update={"tasks": tasks, "search": search}) if tasks else None


# A run may continue although these differ: they change how much is searched and how, not what a trial is.
FREE = (
    "search.trials",
    "search.tokens",
    "search.on_outage",
    "run",
    "evaluate.finalists",
    "evaluate.reruns",
    "train.together",
    "llm.base_url",
    "llm.api_key_env",
    "llm.timeout",
    "llm.attempts",
    "llm.price",
    "llm.max_calls",
    "llm.max_total_tokens",
    "llm.max_usd",
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Genome:
    """The genome in the YAML file `path`.

    Args:
        path: At most 1 MiB of YAML; see `yamltext` for what is refused.
        overrides: `a.b=value` each, applied in order; the value is YAML.

    Raises:
        GenomeError: It cannot be read, or does not say a genome; the message lists all that is wrong.
    """
    path = Path(path)
    return parse(_read(path), source=str(path), overrides=overrides, folder=path.parent)


def parse(
    text: str, source: str = "genome", overrides: Sequence[str] = (), folder: Path | None = None
) -> Genome:
    """As `load`, for YAML in a string.

    Args:
        text: The YAML.
        source: What messages call it.
        overrides: As in `load`.
        folder: What the paths in `warm_start` are relative to; the working directory by default.

    Raises:
        GenomeError: As in `load`.
    """
    data = yamltext.override(yamltext.parse(text, source), overrides)
    if not isinstance(data, dict):
        raise GenomeError(
            f"{source}: a genome must be a mapping with the keys `genome` and `tasks`, but got "
            f"{type(data).__name__}; see genomes/."
        )
    try:
        genome = Genome.model_validate(data)
    except ValidationError as error:
        wrong = explain(error, Genome)
        if len(wrong) == 1:
            raise GenomeError(f"{source}: {wrong[0]}") from None
        lines = "\n".join(f"  - {sentence}" for sentence in wrong)
        raise GenomeError(f"{source}: {len(wrong)} things are wrong:\n{lines}") from None
    names = [f"{source}: `warm_start.{index}`" for index in range(len(genome.warm_start))]
    recipes = [_recipe(*pair, folder or Path()) for pair in zip(genome.warm_start, names, strict=True)]
    return genome.model_copy(update={"warm_start": recipes})


def _read(path: Path) -> str:
    """The text of `path`, without reading more of it than may be parsed."""
    try:
        with path.open("rb") as file:
            content = file.read(yamltext.MAX_BYTES + 1)
    except OSError as error:
        raise GenomeError(f"{path}: it cannot be read ({error.strerror}); check the path.") from None
    if len(content) > yamltext.MAX_BYTES:
        raise GenomeError(f"{path}: it must be at most {yamltext.MAX_BYTES} bytes; shorten it.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GenomeError(f"{path}: it must be UTF-8, but byte {error.start} is not; convert it.") from None


def _recipe(entry: str | dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """The mergekit configuration that a warm start gives or points to."""
    if isinstance(entry, str):
        path = folder / entry
        recipe = yamltext.parse(_read(path), str(path))
    else:
        recipe = entry
    if not isinstance(recipe, dict) or "merge_method" not in recipe:
        got = str(recipe)[:80]
        raise GenomeError(f"{name} must be a mergekit configuration, with `merge_method`, but got {got!r}.")
    return recipe


def dump(genome: Genome) -> str:
    """YAML with every key written out; `parse` gives an equal Genome back."""
    return yamltext.dump(_plain(genome))


def fingerprint(genome: Genome) -> str:
    """A SHA-256 in hex that is equal for genomes whose trials are comparable (`FREE` is left out)."""
    flat = {key: value for key, value in _flat(_plain(genome)).items() if not _is_free(key)}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def diff(old: Genome, new: Genome) -> list[str]:
    """What differs, a line for each key: `search.trials: 50 -> 80`."""
    return [line for _, line in _differences(old, new)]


def resumable_difference(old: Genome, new: Genome) -> list[str]:
    """The lines of `diff` that forbid continuing the run of `old` with `new`; empty if it may go on."""
    return [line for key, line in _differences(old, new) if not _is_free(key)]


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE)


def _plain(genome: Genome) -> dict[str, Any]:
    return genome.model_dump(mode="json", by_alias=True)


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; an empty mapping or list is a leaf."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    flat: dict[str, Any] = {}
    for key, value in pairs:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat or {prefix: data}


def _differences(old: Genome, new: Genome) -> list[tuple[str, str]]:
    before, after = _flat(_plain(old)), _flat(_plain(new))
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        texts = [json.dumps(flat[key]) if key in flat else "(absent)" for flat in (before, after)]
        if texts[0] != texts[1]:
            lines.append((key, f"{key}: {texts[0]} -> {texts[1]}"))
    return lines
