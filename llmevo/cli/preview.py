"""What a run would do, without doing it: no weights, no language model, nothing written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from llmevo.cli.estimate import Estimate, estimate
from llmevo.errors import LlmevoError
from llmevo.evaluate.items import rung_sizes
from llmevo.genome import Genome
from llmevo.optimizer import Optimizer
from llmevo.recipe import Recipes, Reference
from llmevo.report.words import duration
from llmevo.runner import opening
from llmevo.runner.rungs import Rungs
from llmevo.space import Space
from llmevo.store import DATABASE, Store
from llmevo.trial import State, Trial

_STAGES = ("propose", "merge", "train", "evaluate", "store")


@final
@dataclass(frozen=True, slots=True)
class Preview:
    """A run before it begins.

    Args:
        genome: What would be searched.
        run_dir: Where the run would lie.
        space: The genes.
        references: What would be evaluated first.
        batch: Trials per `ask`.
        proposals: The first points that do not depend on results.
        proposer: Who makes them.
        note: Why there are none, or what they leave out.
        seconds: Of the whole run, estimated; None if nothing was ever measured.
        source: What the estimate comes from.
        model: What the language model would take; None if none is asked.
        rungs: How many items trials of a batch would answer, or how far they would be trained, in a line.
    """

    genome: Genome
    run_dir: Path
    space: Space
    references: tuple[Reference, ...]
    batch: int
    proposals: tuple[Trial, ...]
    proposer: str
    note: str
    seconds: float | None
    source: str
    model: Estimate | None = None
    rungs: str = ""

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "genome": self.genome.model_dump(mode="json", by_alias=True),
            "run_dir": str(self.run_dir),
            "space": {
                name: {
                    "type": type(gene).__name__.lower(),
                    **{
                        slot: list(value) if isinstance(value := getattr(gene, slot), tuple) else value
                        for slot in gene.__slots__
                    },
                    "init": gene.start,
                }
                for name, gene in self.space.genes.items()
            },
            "references": [reference.origin for reference in self.references],
            "batch": self.batch,
            "proposer": self.proposer,
            "proposals": [{"origin": trial.origin, "params": trial.params} for trial in self.proposals],
            "note": self.note,
            "seconds": self.seconds,
            "estimate_from": self.source,
            "rungs": self.rungs,
            "llm": None if self.model is None else self.model.to_json(),
        }


def preview(genome: Genome, run_dir: Path, layers: int) -> Preview:
    """What `runner.run` would do with this genome.

    Args:
        genome: The genome.
        run_dir: Where the run would lie.
        layers: Transformer layers of the models.
    """
    recipes = Recipes(genome, layers)
    references = tuple(opening.references(genome, recipes))
    batch = opening.batch(genome.search, recipes.space)
    quiet, note = _without_language_model(genome)
    trials: list[Trial] = []
    if quiet is not None:
        optimizer = Optimizer(
            recipes.space,
            opening.proposer(quiet, recipes),
            direction=genome.search.direction,
            seed=genome.search.seed,
        )
        for reference in references:
            optimizer.enqueue(reference.params, origin=reference.origin)
        if references:
            optimizer.ask(len(references))
        trials = optimizer.ask(batch)
    seconds, source, items = _estimate(genome, run_dir)
    return Preview(
        genome=genome,
        run_dir=run_dir,
        space=recipes.space,
        references=references,
        batch=batch,
        proposals=tuple(trials),
        proposer=genome.search.proposer,
        note=note,
        seconds=seconds,
        source=source,
        model=estimate(genome, recipes, len(references), batch),
        rungs=_rungs(genome, items, batch),
    )


def _rungs(genome: Genome, items: dict[str, int], batch: int) -> str:
    """The rungs, where an earlier run counted the items; else the rule that will make them."""
    halving = genome.search.halving
    if genome.train is not None:
        rungs = None
        if halving.enabled is not False:
            rungs = Rungs.of({"shares": halving.tokens.shares}, genome.search, batch)
        if rungs is None:
            return "none, every training is a whole"
        return rungs.describe() + (", if the tokens suffice" if halving.enabled is None else "")
    if items:
        made = rung_sizes(halving, items)
        rungs = Rungs.of({"rungs": made}, genome.search, batch)
        whole = f"none, every trial answers all {sum(items.values())} items"
        return whole if rungs is None else rungs.describe()
    if halving.enabled is False:
        return "none, every trial answers all items"
    where = f" where the search has at least {2 * halving.first} items" if halving.enabled is None else ""
    return f"from {halving.first} items on, {halving.eta} times as many for one trial in {halving.eta}{where}"


def _without_language_model(genome: Genome) -> tuple[Genome | None, str]:
    """The genome with a proposer that asks no language model, or None if there is no such proposer."""
    search = genome.search
    if search.proposer in ("llm", "warmstart"):
        return None, "the language model is asked when the run begins"
    if search.proposer == "hybrid":
        base = search.model_copy(update={"proposer": search.base})
        guest = "the language model" if search.guest == "llm" else search.guest
        note = f"the base proposer's; after {search.warmup} trials {guest} has {search.share:.0%} at most"
        return genome.model_copy(update={"search": base}), note
    return genome, "as they are before any result is known"


def _estimate(genome: Genome, run_dir: Path) -> tuple[float | None, str, dict[str, int]]:
    """Seconds that the trials still to come would take, and the search's items by task, from an earlier run.

    The earlier run has the same models and tasks; without one, the seconds are None and there are no items.
    """
    neighbours = sorted(run_dir.parent.glob(f"*/{DATABASE}")) if run_dir.parent.is_dir() else []
    folders = [run_dir, *(path.parent for path in neighbours if path.parent != run_dir)]
    for folder in folders:
        if not (folder / DATABASE).is_file():
            continue
        try:
            with Store.open(folder, readonly=True) as store:
                if _workload(store.genome) != _workload(genome):
                    continue
                trials = store.trials()
                counted = (store.meta("pipeline") or {}).get("items", {})
                seeds = {key[:2] for key in store.reruns()} if folder == run_dir else set()
        except LlmevoError:  # a damaged neighbour is no reason not to preview this run
            continue
        spent = [seconds for trial in trials if (seconds := _seconds(trial)) > 0]
        if spent:
            finished = sum(trial.state is not State.PENDING for trial in trials)
            left = genome.search.trials - (finished if folder == run_dir else 0)
            mean = sum(spent) / len(spent)
            per_trial = f"{duration(mean)} a trial, the mean of {len(spent)} in {folder}"
            if (again := _again(genome) - len(seeds)) > 0:
                left, per_trial = max(left, 0) + again, f"{per_trial}; {again} are trainings with other seeds"
            items = {task: splits["search"] for task, splits in counted.items() if isinstance(splits, dict)}
            return max(left, 0) * mean / genome.run.workers, per_trial, items
    unknown = "nothing of these models and tasks was measured yet; the first trials of a run will tell"
    return None, unknown, {}


def _again(genome: Genome) -> int:
    """How many trainings with other seeds the end of the run has: the finalists' and the default's."""
    return 0 if genome.train is None else genome.reruns * (genome.evaluate.finalists + 1)


def _seconds(trial: Trial) -> float:
    return sum(float(trial.cost.get(stage, 0.0)) for stage in _STAGES if trial.state is not State.PENDING)


def _workload(genome: Genome) -> tuple[object, ...]:
    """What a trial's time depends on."""
    spec, evaluate = genome.genome, genome.evaluate
    names: Iterable[str] = sorted(task.name for task in genome.tasks)
    halving = genome.search.halving.model_dump_json()
    return (
        *spec.models,
        spec.base_model,
        *names,
        genome.limit,
        genome.num_fewshot,
        evaluate.holdout,
        halving,
        genome.train,
    )
