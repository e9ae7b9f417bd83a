"""The genome file: what the YAML may say, as pydantic models.

The upper half (`genome`, `tasks`, `limit` and so on) is `mergekit-evolve`'s format, so that its files run
here unchanged. `search`, `llm`, `evaluate`, `run` and `warm_start` are ours. Unknown keys are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from llmevo.space import Value


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FloatGene(_Model):
    """`{float: [low, high], log: false, step: null, init: null}`."""

    bounds: tuple[float, float] = Field(alias="float")
    log: bool = False
    step: Annotated[float, Field(gt=0)] | None = None
    init: float | None = None


class IntGene(_Model):
    """`{int: [low, high], log: false, step: 1, init: null}`."""

    bounds: tuple[int, int] = Field(alias="int")
    log: bool = False
    step: Annotated[int, Field(ge=1)] = 1
    init: int | None = None


class ChoiceGene(_Model):
    """`{choice: [a, b, c], ordered: false, init: null}`."""

    choices: Annotated[list[Value], Field(min_length=1)] = Field(alias="choice")
    ordered: bool = False
    init: Value = None


GeneSpec: TypeAlias = FloatGene | IntGene | ChoiceGene


class MergeSpec(_Model):
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
        parameters: Per-model or global mergekit parameters, each a number or a gene. What is not named here
            and is searched by mergekit-evolve (weight, density, t) is a gene with its default range.
        dtype: In which the merge is computed and exported.
    """

    models: Annotated[list[str], Field(min_length=1)]
    merge_method: str | Annotated[list[str], Field(min_length=1)] = "task_arithmetic"
    base_model: str | None = None
    tokenizer_source: str | None = None
    layer_granularity: Annotated[int, Field(ge=0)] = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: list[str] | None = None
    smooth: bool = False
    parameters: dict[str, GeneSpec | bool | int | float | str] = Field(default_factory=dict)
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


class TaskSpec(_Model):
    """One lm-eval task of the fitness.

    Attributes:
        name: lm-eval's name, or that of a local task from `evaluate.task_path`.
        weight: Factor of the metric in the score.
        metric: `metric,filter` as lm-eval prints it, e.g. `acc,none`.
    """

    name: str
    weight: float = 1.0
    metric: str = "acc,none"


class StrengthSpec(_Model):
    """How the mutation strength (a standard deviation in the unit cube) adapts.

    Attributes:
        rule: `one_fifth`, or `two_level` as in LLM-Evo-Merge (--sigma-low, --sigma-high).
        improve: two_level: strength after an improvement.
        stagnate: two_level: strength otherwise.
    """

    rule: Literal["one_fifth", "two_level"] = "one_fifth"
    improve: Annotated[float, Field(gt=0, le=1)] = 0.05
    stagnate: Annotated[float, Field(gt=0, le=1)] = 0.2


class SearchSpec(_Model):
    """Who proposes, and how much.

    Attributes:
        proposer: `random`, `sobol`, `ga`, `cma`, `llm` or `hybrid`.
        base: hybrid only: the base proposer.
        share: hybrid only: the LLM's exact share of the trials after `warmup`.
        warmup: hybrid only: trials before the LLM's first.
        trials: How many trials the search makes, references included.
        population: Trials per generation; None for the proposer's default.
        seed: Everything random follows from it.
        strength: Mutation strength of `ga` and `llm`.
        direction: Whether the weighted score is maximised or minimised.
        references: Whether the baseline, the parents and the uniform merge are evaluated first.
        sigma0: cma only: initial step in the unit cube.
    """

    proposer: str = "cma"
    base: str = "cma"
    share: Annotated[float, Field(ge=0, le=1)] = 0.3
    warmup: Annotated[int, Field(ge=0)] = 10
    trials: Annotated[int, Field(ge=1)] = 100
    population: Annotated[int, Field(ge=2)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    strength: StrengthSpec = StrengthSpec()
    direction: Literal["maximize", "minimize"] = "maximize"
    references: bool = True
    sigma0: Annotated[float, Field(gt=0, le=1)] = 1 / 6


class LLMSpec(_Model):
    """Which language model proposes.

    Attributes:
        backend: `openai` for any OpenAI-compatible endpoint, `local` for a transformers model in this
            process, `auto` for the endpoint where the key or a base_url is there, else local.
        model: The endpoint's name of the model (openai).
        local_model: Path of a transformers model (local).
        base_url: Of the endpoint; None for OpenAI's own.
        api_key_env: Environment variable that holds the key. Keys are never read from a file.
        temperature: Of the sampling; None to leave it out of the request.
        max_tokens: Longest reply.
        timeout: Seconds for one attempt.
        attempts: Attempts at one request, the first included.
    """

    backend: Literal["auto", "openai", "local"] = "auto"
    model: str | None = None
    local_model: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.7
    max_tokens: Annotated[int, Field(ge=16)] = 2048
    timeout: Annotated[float, Field(gt=0)] = 120.0
    attempts: Annotated[int, Field(ge=1)] = 4


class EvaluateSpec(_Model):
    """How models are scored.

    Attributes:
        batch_size: Requests per forward pass; None lets llmevo choose once per run.
        dtype: Of the resident model; `auto` is bfloat16 where the hardware has it, else float32.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        holdout: Share of each task's items that the search never sees.
        task_path: Folders with local lm-eval tasks. They are code: name only what you trust.
        max_length: Longest context in tokens; None for the model's.
        finalists: How many of the best trials are scored on the held-out items at the end.
    """

    batch_size: Annotated[int, Field(ge=1)] | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "auto"
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    task_path: list[str] = Field(default_factory=list)
    max_length: Annotated[int, Field(ge=1)] | None = None
    finalists: Annotated[int, Field(ge=1)] = 1


class RunSpec(_Model):
    """Where and how the run is kept.

    Attributes:
        dir: The run directory; None for `runs/<name of the genome file>`.
        workers: Processes that each hold a model.
        timeout: Seconds after which a trial is a failure; None for never.
    """

    dir: str | None = None
    workers: Annotated[int, Field(ge=1)] = 1
    timeout: Annotated[float, Field(gt=0)] | None = None


class Genome(_Model):
    """A whole genome file."""

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
    evaluate: EvaluateSpec = EvaluateSpec()
    run: RunSpec = RunSpec()
    warm_start: list[str | dict[str, Any]] = Field(default_factory=list)
