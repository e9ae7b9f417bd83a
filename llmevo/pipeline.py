"""merge -> train -> evaluate, for one trial: plain data in, plain data out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

import numpy as np

from llmevo.errors import GenomeError, StageError
from llmevo.evaluate.hardware import free_memory
from llmevo.proposers.population import SKETCH
from llmevo.space import Params
from llmevo.trial import Score
from llmevo.trial import Split as Split

if TYPE_CHECKING:
    from llmevo.genome import Genome
    from llmevo.train import Start, Trained, Trainer

ADAPTERS = "adapters"  # where in the run directory the trained adapters are
_LONGEST_ERROR = 500


@final
@dataclass(frozen=True, slots=True)
class Job:
    """One trial to run.

    Args:
        number: The trial's number.
        params: A value for every gene; empty if `recipe` is given.
        seed: Everything random in the stages follows from it (DARE masks, say).
        split: Which of the run's items to score.
        recipe: A mergekit configuration to evaluate instead of the params' own, for parents, the uniform
            merge and warm starts.
        rung: Score only the items up to this rung, an index into `describe()["rungs"]`; in a run that trains,
            train up to this share, an index into `describe()["shares"]`, and score its loss. None for all.
        exact: Merge with mergekit's own arithmetic, whatever `merge.mode` says.
        rerun: Train with the seed of this re-run; 0 for the search's own.
        inherit: What an individual of a population inherits, as its proposer wrote it; empty for fresh
            weights, None outside a population.
    """

    number: int
    params: Params
    seed: int
    split: Split = "search"
    recipe: dict[str, Any] | None = None
    rung: int | None = None
    exact: bool = False
    rerun: int = 0
    inherit: dict[str, Any] | None = None


def training_seed(seed: int, rerun: int) -> int:
    """The seed of a training: the run's own, or for a re-run another that follows from both."""
    return seed if rerun == 0 else int(np.random.SeedSequence([seed, rerun]).generate_state(1)[0]) >> 1


def adapter_folder(number: int, rerun: int = 0) -> str:
    """The name of a trial's folder in `ADAPTERS`."""
    return f"trial{number:04d}" + (f"-rerun{rerun}" if rerun else "")


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job.

    Args:
        number: The trial's number.
        score: The fitness with the per-item scores of each task's metric; None if the job failed.
        metrics: Every metric by task, for people: `{task: {metric: value}}`.
        seconds: Wall time by stage (`merge`, `train`, `evaluate`).
        bytes: Bytes by stage, where a stage counts them.
        error: One line saying why the job failed.
        stage: The stage that failed.
        items: How many items were `scored` now, how many were `cached`, and, if batches did not fit into the
            accelerator's memory, how often they were `halved`.
        tokens: On how many the candidate has been trained, by earlier jobs too.
    """

    number: int
    score: Score | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    stage: str | None = None
    items: dict[str, int] = field(default_factory=dict)
    tokens: int = 0


class Pipeline(Protocol):
    """Runs jobs; everything that does not depend on the trial is loaded when it is made."""

    def run(self, job: Job) -> Outcome:
        """Merge, train and evaluate; a failure is an Outcome with `error`, never an exception."""
        ...

    def ahead(self, jobs: Sequence[Job]) -> None:
        """Do at once what jobs have in common; each of them is run after it, and gives what it would."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts about what was loaded, for the run's record: items by task and split, device, dtype."""
        ...


@final
class MergePipeline:
    """Merges a recipe into one resident model, trains an adapter on it, and evaluates it there.

    Parents, tasks, prompts and examples are loaded when the pipeline is made; a job costs one merge, the
    training where the genome has `train`, and the forward passes. Weights that have answered a job's items
    before cost none of it. A job that fails, in whatever way, leaves the pipeline ready for the next one:
    each merge writes every weight anew, and adapters come off. A job with a recipe of its own (a parent, say)
    is not trained, nor is one whose adapter the run directory has.

    Args:
        genome: The genome.

    Raises:
        GenomeError: The parents do not fit together, a gene, a task or a device is wrong.
    """

    def __init__(self, genome: Genome) -> None:
        from llmevo import evaluate, fitness, merge, recipe

        started = time.monotonic()
        self._recipes = recipe.Recipes(genome, recipe.num_layers(genome))
        device = evaluate.device(genome.evaluate)
        dtype = evaluate.dtype(genome.evaluate, device)
        self._merger: merge.Merger | merge.Loaded
        if genome.train is not None and genome.alone and merge.needed(genome.genome, genome.train.head):
            head, seed = genome.train.head, genome.search.seed
            self._merger = merge.Loaded(genome.genome, head, seed=seed, device=device, dtype=dtype)
        else:
            self._merger = merge.Merger(genome.genome, genome.merge, device=device, dtype=dtype)
        if self._merger.tokenizer is None:
            raise GenomeError(
                "`genome.models` must have a tokenizer beside the base model's weights, but has none."
            )
        loaded = time.monotonic()
        self._trainer = self._make_trainer(genome)
        prepared = time.monotonic()
        tasks = genome.for_lm_eval()
        evaluator = None
        if tasks is not None:
            evaluator = evaluate.Evaluator(
                tasks,
                self._merger.model,
                self._merger.tokenizer,
                device=device,
                cache=evaluate.open_cache() if genome.run.cache else None,
            )
        self._fitness = fitness.Fitness(genome, evaluator, self._trainer)
        self._shared: dict[int, float] = {}
        self._kept = None if genome.run.dir is None else Path(genome.run.dir) / ADAPTERS
        self._facts: dict[str, Any] = {
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "parents": self._merger.facts,
            "parent_bytes": self._merger.bytes_held,
            "memory": self._merger.memory,
            "seconds": {"models": loaded - started, "tasks": time.monotonic() - prepared},
        }
        if self._trainer is not None:
            self._facts["seconds"]["examples"] = prepared - loaded

    def _make_trainer(self, genome: Genome) -> Trainer | None:
        if genome.train is None:
            return None
        from llmevo.train import Trainer

        return Trainer(
            genome.train,
            self._merger.model,
            self._merger.tokenizer,
            seed=genome.search.seed,
            halving=genome.search.halving,
            metrics=[task.name for task in genome.own_tasks],
        )

    def run(self, job: Job) -> Outcome:
        """Merge, train and evaluate; a failure is an Outcome with `error`, never an exception.

        Only what ends the process (KeyboardInterrupt, SystemExit) passes through.
        """
        seconds: dict[str, float] = {}
        sizes: dict[str, int] = {}
        training: dict[str, dict[str, float]] = {}
        stage = "merge"
        if self._trainer is not None:
            self._trainer.reached = 0
        try:
            with ExitStack() as on_the_model:
                with _timed(seconds, stage):
                    merged = self._recipes.recipe(job.params) if job.recipe is None else job.recipe
                    trains = self._trainer is not None and job.recipe is None
                    # What is trained is not known by its merge, and its adapter is wanted.
                    weights = None if trains else self._merger.identity(merged, job.seed, exact=job.exact)
                    if weights is None or not self._fitness.known(job.split, job.rung, weights):
                        sizes[stage] = self._merger.merge(merged, job.seed, exact=job.exact)
                if trains:
                    stage = "train"
                    with _timed(seconds, stage):
                        trained = on_the_model.enter_context(self._candidate(job, merged))
                    seconds[stage] += self._shared.pop(job.number, 0.0)
                    training = {stage: trained.metrics}
                    training |= {SKETCH: trained.sketch} if trained.sketch else {}
                    if trained.bytes:  # it came to its end
                        sizes[stage] = trained.bytes
                    for number, epoch in enumerate(trained.epochs, start=1):
                        training[f"epoch {number}"] = epoch
                stage = "evaluate"
                with _timed(seconds, stage):
                    score, metrics = self._fitness.evaluate(job.split, rung=job.rung, weights=weights)
        except Exception as error:  # a trial's failure is data, whatever it is
            failed, reason = _reason(error, stage)
            outcome = Outcome(
                job.number, seconds=seconds, bytes=sizes, error=reason, stage=failed, tokens=self._tokens
            )
        else:
            found = {**metrics, **training}
            items, tokens = self._fitness.last, self._tokens
            return Outcome(job.number, score, found, seconds, sizes, items=items, tokens=tokens)
        free_memory()
        return outcome

    def ahead(self, jobs: Sequence[Job]) -> None:
        """Train together what the jobs would train one after the other on equal weights; see `Trainer.ahead`.

        Individuals of a population train alone. Whatever goes wrong is left for the jobs to meet again. The
        time is theirs in equal parts.
        """
        groups: dict[str, list[Job]] = {}
        try:
            for job in jobs:
                alone = job.recipe or job.rerun or job.inherit is not None
                if self._kept is not None and self._trainer is not None and not alone:
                    base = self._merger.identity(self._recipes.recipe(job.params), job.seed)
                    groups.setdefault(base, []).append(job)
            for base, members in groups.items():
                self._train_ahead(base, members)
        except Exception:  # each job says for itself what is wrong
            free_memory()

    def _train_ahead(self, base: str, jobs: Sequence[Job]) -> None:
        if self._trainer is None or self._kept is None or len(jobs) < 2:
            return
        started = time.monotonic()
        self._merger.merge(self._recipes.recipe(jobs[0].params), jobs[0].seed)
        chosen = [
            (
                self._trainer.settings(job.params),
                job.number,
                self._kept / adapter_folder(job.number, job.rerun),
                job.rung,
            )
            for job in jobs
        ]
        self._trainer.ahead(chosen, base)
        share = (time.monotonic() - started) / len(jobs)
        self._shared.update({job.number: share for job in jobs})

    @property
    def _tokens(self) -> int:
        """On how many the latest job's candidate was trained."""
        return 0 if self._trainer is None else self._trainer.reached

    def _candidate(self, job: Job, merged: dict[str, Any]) -> AbstractContextManager[Trained]:
        """The job's training on the merge that is in the model."""
        assert self._trainer is not None
        folder = None if self._kept is None else self._kept / adapter_folder(job.number, job.rerun)
        base = self._merger.identity(merged, job.seed)
        settings = self._trainer.settings(job.params)
        seed, start = training_seed(job.seed, job.rerun), self._start(job)
        return self._trainer.candidate(settings, job.number, base, folder, job.rung, start, seed=seed)

    def _start(self, job: Job) -> Start | None:
        """What the job's candidate inherits."""
        from llmevo.train import Start

        if job.inherit is None:
            return None
        known = job.inherit
        if not known:
            return Start()
        if self._kept is None:
            raise StageError("train", "`run.dir` must be given: a child's parents are kept there")
        shares = (known["share"], 1 - known["share"])
        parents = zip(map(self._kept.joinpath, map(adapter_folder, known["parents"])), shares, strict=True)
        return Start(tuple(parents), known["strength"], known["seed"], known["generation"])

    def describe(self) -> dict[str, Any]:
        """`device`, `dtype`, `parents`, `parent_bytes`, `memory`, `seconds`, and `Fitness.describe()`."""
        return {**self._facts, **self._fitness.describe()}


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Write the block's wall time into `seconds[stage]`, also where it fails."""
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[stage] = time.monotonic() - started


def _reason(error: Exception, stage: str) -> tuple[str, str]:
    """The stage that failed, and one line saying why."""
    if isinstance(error, StageError):
        return error.stage, " ".join(str(error).split())[:_LONGEST_ERROR]
    # torch's own is a RuntimeError of this name, and imported only where torch is.
    kind = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":
        kind = "out of memory"
    text = " ".join(str(error).split())
    return stage, f"{stage}: {kind}{': ' if text else ''}{text}"[:_LONGEST_ERROR]
