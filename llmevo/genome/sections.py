"""The sections of a genome file that are llmevo's own: `search`, `merge`, `evaluate` and `run`."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator

from llmevo.genome.spec import Spec


class StrengthSpec(Spec):
    """How the mutation strength (a standard deviation in the unit cube) adapts.

    Attributes:
        rule: `one_fifth`, or `two_level` as in LLM-Evo-Merge (--sigma-low, --sigma-high).
        improve: two_level: strength after an improvement.
        stagnate: two_level: strength otherwise.
    """

    rule: Literal["one_fifth", "two_level"] = "one_fifth"
    improve: Annotated[float, Field(gt=0, le=1)] = 0.05
    stagnate: Annotated[float, Field(gt=0, le=1)] = 0.2


class TokenRungsSpec(Spec):
    """The rungs of a search that trains: the loss on the validation examples ranks them.

    Attributes:
        shares: Of a candidate's tokens after which a rung ends, ascending; the last rung is the whole.
        eta: One in `eta` trials of a rung reaches the next.
    """

    shares: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.1, 0.3)
    eta: Annotated[int, Field(ge=2)] = 3

    @field_validator("shares", mode="after")
    @classmethod
    def _ascending(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if any(later <= earlier for earlier, later in pairwise(shares)):
            raise ValueError(f"must ascend, but got {list(shares)}; sort them and give each once")
        return shares


class HalvingSpec(Spec):
    """Successive halving inside a batch: all trials see a few items, the better ones see more.

    With `train` the rungs are shares of a training, and only `enabled` and `tokens` count.

    Attributes:
        enabled: None for yes where the search has at least twice `first` items; with `train`, where a batch
            and the first rung are large enough (see docs/training.md).
        first: Items of the first rung, over all tasks.
        eta: One in `eta` trials of a rung reaches the next, which has `eta` times its items.
        rank_by: What ranks a rung: the score itself, or the weighted mean of a continuous measure of
            multiple-choice tasks (`gold_logprob`, `gold_margin`) while the score is what is reported.
        tokens: The rungs of a search that trains.
    """

    enabled: bool | None = None
    first: Annotated[int, Field(ge=1)] = 70
    eta: Annotated[int, Field(ge=2)] = 2
    rank_by: Literal["score", "gold_logprob", "gold_margin"] = "score"
    tokens: TokenRungsSpec = TokenRungsSpec()

    def idle(self, trains: bool) -> list[str]:
        """The keys that are set and have no effect, as rungs are tokens where something is trained."""
        names = ("first", "eta", "rank_by") if trains else ("tokens",)
        default = HalvingSpec()
        return [name for name in names if getattr(self, name) != getattr(default, name)]


class MergeStageSpec(Spec):
    """How merges are computed while searching; the export always goes through mergekit itself.

    Attributes:
        mode: `fast` for one pass over resident buffers, rounded once, where the method allows it; `exact` for
            mergekit's own arithmetic, bit for bit.
        memory: `resident` keeps every parent in the device's memory; `streamed` reads them for each merge,
            from the disk or for a GPU from main memory; `auto` is resident where there is room.
    """

    mode: Literal["fast", "exact"] = "fast"
    memory: Literal["auto", "resident", "streamed"] = "auto"


class SearchSpec(Spec):
    """Who proposes, and how much.

    Attributes:
        proposer: `random`, `sobol`, `ga`, `cma`, `llm`, `hybrid`, `warmstart`, `placebo`, `topk_mean`, or
            `population`, whose individuals are adapters that are trained on.
        base: hybrid and warmstart only: the base proposer.
        guest: hybrid only: who has the share; a proposer without a model makes it a control.
        share: hybrid only: the guest's highest share of the trials after `warmup`.
        warmup: hybrid only: trials before the guest's first.
        adapt: hybrid only: whether the share falls while the guest wins less than the base.
        screen: hybrid only: whether points that the history speaks against are turned away.
        on_outage: hybrid only: `base` to go on without a model that does not serve, labelled.
        mode: One genome from the language model for each proposal, or one mean for each batch.
        prompts: Folder, from the working directory, whose files replace the prompts of the same name.
        trials: How many trials the search makes, references included.
        tokens: The search ends once its trials, references not counted, were trained on so many; its last
            batches are no larger than there is room for. None for no limit.
        population: Trials per generation, and how many survive it; None for the proposer's default.
        seed: Everything random follows from it.
        strength: Mutation strength of `ga`, `population` and `llm`.
        direction: Whether the weighted score is maximised or minimised.
        references: Whether the baseline, the parents and the uniform merge are evaluated first.
        sigma0: cma only: initial step in the unit cube.
        halving: Fewer items for trials that do badly.
    """

    proposer: str = "cma"
    base: str = "cma"
    guest: Literal["llm", "placebo", "topk_mean", "ga", "random"] = "llm"
    share: Annotated[float, Field(ge=0, le=1)] = 0.3
    warmup: Annotated[int, Field(ge=0)] = 10
    adapt: bool = True
    screen: bool = True
    on_outage: Literal["stop", "base"] = "stop"
    mode: Literal["points", "mean"] = "points"
    prompts: str | None = None
    trials: Annotated[int, Field(ge=1)] = 100
    tokens: Annotated[int, Field(ge=1)] | None = None
    population: Annotated[int, Field(ge=2)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    strength: StrengthSpec = StrengthSpec()
    direction: Literal["maximize", "minimize"] = "maximize"
    references: bool = True
    sigma0: Annotated[float, Field(gt=0, le=1)] = 1 / 6
    halving: HalvingSpec = HalvingSpec()

    @property
    def asks_model(self) -> bool:
        """Whether a language model proposes."""
        mixed = self.proposer == "hybrid" and "llm" in (self.base, self.guest)
        return self.proposer in ("llm", "warmstart") or mixed


class EvaluateSpec(Spec):
    """How models are scored.

    Attributes:
        batch_size: Requests per forward pass of generation and of lm-eval's own log-likelihoods; None lets
            llmevo choose once per run. Packed log-likelihoods have batches of their own.
        dtype: Of the resident model; `auto` is bfloat16 where the hardware has it, else float32.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        holdout: Share of each task's items that the search never sees.
        task_path: Folders with local lm-eval tasks. They are code: name only what you trust.
        max_length: Longest context in tokens; None for the model's.
        finalists: How many of the best trials are scored on the held-out items at the end.
        reruns: With `train`: how often the finalists and the default are trained again with fresh seeds, so
            that the mean over seeds decides between them; never with `population`, whose individuals have
            several trainings behind them.
        reference: Whether every forward pass is lm-eval's own (`--reference-eval`), instead of one that
            computes shared contexts once.
    """

    batch_size: Annotated[int, Field(ge=1)] | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "auto"
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    task_path: list[str] = Field(default_factory=list)
    max_length: Annotated[int, Field(ge=1)] | None = None
    finalists: Annotated[int, Field(ge=1)] = 3
    reruns: Annotated[int, Field(ge=0)] = 1
    reference: bool = False


class RunSpec(Spec):
    """Where and how the run is kept.

    Attributes:
        dir: The run directory; None for `runs/<name of the genome file>`.
        workers: Processes that each hold a model.
        timeout: Seconds after which a trial is a failure; None for never.
        cache: Whether answers to items are kept for all runs of this user (in `$LLMEVO_CACHE`, by default
            `~/.cache/llmevo`), so that the same weights are never asked the same items twice.
    """

    dir: str | None = None
    workers: Annotated[int, Field(ge=1)] = 1
    timeout: Annotated[float, Field(gt=0)] | None = None
    cache: bool = True
