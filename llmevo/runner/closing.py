"""The end of a run: trainings again with fresh seeds, and what is compared on the held-out items."""

from __future__ import annotations

from collections.abc import Sequence

from llmevo.genome import Genome
from llmevo.pipeline import Outcome, Split, training_seed
from llmevo.runner import adapters, finals
from llmevo.runner.observer import Observer
from llmevo.runner.workers import Workers, job_of
from llmevo.store import Store
from llmevo.trial import Trial


def score(
    genome: Genome,
    store: Store,
    observer: Observer,
    workers: Workers,
    trials: Sequence[Trial],
    references: int,
) -> None:
    """Score the plan's trials on the held-out items; what an earlier sitting scored is kept.

    Where something is trained, the finalists and the default are trained again first, and the validation
    examples say who of them is the best; only then are the held-out items read.

    Args:
        genome: What was searched.
        store: Of the run.
        observer: Is told what is done.
        workers: Where jobs run.
        trials: The whole run, by number.
        references: How many of the first trials no proposer made.

    Raises:
        Halt: A signal or the limit of the sitting came first.
    """
    if genome.evaluate.holdout == 0:
        return
    planned = finals.planned(genome, trials, references, {})
    trained = [] if genome.train is None else [t for label, t in planned if finals.is_trained_again(label)]
    _train_again(genome, store, observer, workers, trained, "search")
    _hold_out(genome, store, observer, workers, finals.planned(genome, trials, references, store.reruns()))
    _train_again(genome, store, observer, workers, trained, "holdout")
    adapters.prune_reruns(store.run_dir)


def _hold_out(
    genome: Genome, store: Store, observer: Observer, workers: Workers, planned: Sequence[tuple[str, Trial]]
) -> None:
    known = store.holdout_numbers()
    labels = {trial.number: label for label, trial in planned}
    store.label_holdout({label: number for number, label in labels.items() if number in known})
    new = [trial for _, trial in planned if trial.number not in known]
    if not new:
        return
    observer.note(f"scoring {len(new)} trials on the held-out items")
    workers.drive(
        [job_of(genome, trial, "holdout") for trial in new],
        lambda outcome: store.save_holdout(labels[outcome.number], outcome.number, outcome),
    )


def _train_again(
    genome: Genome,
    store: Store,
    observer: Observer,
    workers: Workers,
    trials: Sequence[Trial],
    split: Split,
) -> None:
    """One fresh seed after the other; a training that failed has nothing to hold out."""
    for rerun in range(1, genome.reruns + 1):
        known = store.reruns()
        new = [trial for trial in trials if (trial.number, rerun, split) not in known]
        if split == "holdout":
            new = [trial for trial in new if known[trial.number, rerun, "search"].score is not None]
        if not new:
            continue
        seed = training_seed(genome.search.seed, rerun)
        if split == "search":
            observer.note(f"training {len(new)} trials again with the seed {seed}")

        def arrived(outcome: Outcome, rerun: int = rerun, seed: int = seed) -> None:
            store.save_rerun(rerun, seed, split, outcome)

        workers.drive([job_of(genome, trial, split, rerun=rerun) for trial in new], arrived)
