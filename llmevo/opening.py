"""What a run needs before its first trial: the store, the proposer, and that nothing changed underneath."""

from __future__ import annotations

import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from llmevo.errors import StoreError
from llmevo.genome import Genome, SearchSpec, resumable_difference
from llmevo.proposers import Proposer, make
from llmevo.rundir import move_aside
from llmevo.space import Space
from llmevo.store import DATABASE, Store
from llmevo.strength import OneFifth, Strength, TwoLevel

_PACKAGES = ("llmevo", "numpy", "cmaes", "torch", "transformers", "peft", "mergekit", "lm_eval")


def open_store(path: Path, genome: Genome, genome_text: str, fresh: bool) -> tuple[Store, Path | None]:
    """Create the run, or open the one that is there if `genome` may continue it.

    Returns:
        The store, and where an earlier run was moved to with `fresh`.

    Raises:
        StoreError: The run there cannot be opened, or it has another genome; the message says in what.
    """
    moved = move_aside(path) if fresh and (path / DATABASE).exists() else None
    if not Store.exists(path):
        return Store.create(path, genome_text, genome), moved
    store = Store.open(path)
    try:
        different = resumable_difference(store.genome, genome)
        if different:
            lines = "\n".join(f"  {line}" for line in different)
            raise StoreError(
                f"`{path}` has a run of another genome:\n{lines}\n"
                "Choose another --run-dir, or move the earlier run aside with --fresh."
            )
        if store.genome != genome or store.genome_text != genome_text:
            store.replace_genome(genome_text, genome)
    except BaseException:
        store.close()
        raise
    return store, None


def batch(search: SearchSpec, space: Space) -> int:
    """Trials per `ask`: `search.population`, or CMA-ES's default of 4 + floor(3 ln d) for d genes.

    The default is Hansen's (https://arxiv.org/abs/1604.00772, eq. 48); for the other proposers it is as good
    as any. It must not depend on the machine or the workers, or a resumed run would ask differently.
    """
    return search.population or 4 + math.floor(3 * math.log(len(space)))


def proposer(genome: Genome, space: Space) -> Proposer:
    """The proposer that `search` and `llm` describe.

    Raises:
        ProposerError: No proposer has that name, or it cannot be made.
    """
    search = genome.search
    if search.proposer == "hybrid":
        options = {
            "base": search.base,
            "base_options": _options(search.base, genome),
            "share": search.share,
            "warmup": search.warmup,
            **_options("llm", genome),
        }
    else:
        options = _options(search.proposer, genome)
    return make(search.proposer, space, search.direction, **options)


def _options(name: str, genome: Genome) -> dict[str, Any]:
    search = genome.search
    if name == "cma":
        return {"population": search.population, "sigma0": search.sigma0}
    if name == "ga":
        return {"population": search.population, "strength": strength(search)}
    if name == "llm":
        return _llm_options(genome)
    return {}


def _llm_options(genome: Genome) -> dict[str, Any]:
    from llmevo.llm import client_from
    from llmevo.proposers.llm import Context

    spec = genome.genome
    context = Context(
        models=spec.models, tasks=[task.name for task in genome.tasks], budget=genome.search.trials
    )
    return {"client": client_from(genome.llm), "strength": strength(genome.search), "context": context}


def strength(search: SearchSpec) -> Strength:
    """The rule for the mutation strength that `search.strength` names."""
    spec = search.strength
    return TwoLevel(spec.improve, spec.stagnate) if spec.rule == "two_level" else OneFifth()


def environment() -> dict[str, Any]:
    """The versions that a score may depend on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "machine": platform.machine(), "packages": versions}


def check_facts(store: Store, facts: dict[str, Any]) -> None:
    """Keep what the pipeline says of itself, or refuse to mix scores of different items in one run.

    Raises:
        StoreError: The items are not those that earlier trials were scored on.
    """
    known = store.meta("pipeline")
    if known is None:
        store.set_meta("pipeline", facts)
    elif known.get("items") != facts.get("items"):
        raise StoreError(
            f"`{store.run_dir}` was scored on other items than the tasks give now "
            f"({known.get('items')} before, {facts.get('items')} now); restore the tasks' data, choose "
            "another --run-dir, or move the earlier run aside with --fresh."
        )
