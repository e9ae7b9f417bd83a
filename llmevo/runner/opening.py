"""What a run needs before its first trial: the store, the proposer, and that nothing changed underneath."""

from __future__ import annotations

import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from llmevo import evaluate
from llmevo.errors import GenomeError, StoreError
from llmevo.genome import Genome, LLMSpec, SearchSpec, resumable_difference
from llmevo.llm import DescribedClient, Endpoint, canary, client_from
from llmevo.llm.ledger import Ledger, Limits, Price
from llmevo.llm.prompt import Context, cards
from llmevo.llm.transcript import FOLDER, Transcript
from llmevo.llm.transcript import MODES as MODES_FILE
from llmevo.proposers import Proposer, make
from llmevo.recipe import Recipes, Reference
from llmevo.rundir import move_aside
from llmevo.space import Space
from llmevo.store import DATABASE, Store
from llmevo.strength import OneFifth, Strength, TwoLevel

_PACKAGES = ("llmevo", "numpy", "cmaes", "torch", "transformers", "peft", "mergekit", "lm_eval")
_SCORED = ("items", "fingerprint", "weights", "signs")  # of Pipeline.describe: what a score is made of
_RUNGS = ("rungs", "shares")


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
        if different and not store.trials():  # it failed before its first trial: nothing to mix up
            store.set_meta("pipeline", None)
        elif different:
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


def settled(genome: Genome, store: Store) -> Genome:
    """`genome` with the run's own directory, and what its first sitting chose for `auto`.

    That is the precision, and how many candidates are trained at once. Both are measurements: another worker
    or a resumed run could measure otherwise. Scores in two precisions are not comparable, and a training
    among others differs by rounding from one alone.
    """
    spec = genome.evaluate
    here = genome.run.model_copy(update={"dir": str(store.run_dir)})  # trained adapters are kept there
    genome = genome.model_copy(update={"run": here})
    known = (store.meta("pipeline") or {}).get("train", {}).get("together")
    if genome.train is not None and genome.train.together == "auto" and known is not None:
        together = known if known > 1 else "off"
        train = genome.train.model_copy(update={"together": together})
        genome = genome.model_copy(update={"train": train})
    if spec.dtype != "auto":
        return genome
    chosen = store.meta("dtype")
    if chosen is None:
        chosen = str(evaluate.dtype(spec, evaluate.device(spec))).removeprefix("torch.")
        store.set_meta("dtype", chosen)
    return genome.model_copy(update={"evaluate": spec.model_copy(update={"dtype": chosen})})


def batch(search: SearchSpec, space: Space) -> int:
    """Trials per `ask`: `search.population`, or CMA-ES's default of 4 + floor(3 ln d) for d genes.

    The default is Hansen's (https://arxiv.org/abs/1604.00772, eq. 48); for the other proposers it is as good
    as any. It must not depend on the machine or the workers, or a resumed run would ask differently.
    """
    return search.population or 4 + math.floor(3 * math.log(len(space)))


def references(genome: Genome, recipes: Recipes) -> list[Reference]:
    """The first trials: warm starts, and before them, unless switched off, what the search must beat.

    The default hyperparameters of a training are the last, and cannot be switched off.
    """
    found = recipes.references()
    wanted = ("warm_start:", "default")
    return found if genome.search.references else [r for r in found if r.origin.startswith(wanted)]


def ledger(spec: LLMSpec) -> Ledger:
    """What the run may spend on its language model, and what that costs."""
    price = None if spec.price is None else Price(**spec.price.model_dump())
    return Ledger(price, Limits(spec.max_calls, spec.max_total_tokens, spec.max_usd))


def client(genome: Genome, run_dir: Path) -> Transcript | None:
    """The language model of the proposer, with its calls on record; None if no model is asked.

    Raises:
        LLMError: It is not there, or its key is not.
        StoreError: The records of earlier sittings cannot be read.
    """
    if not genome.search.asks_model:
        return None
    spec, counted = genome.llm, ledger(genome.llm)
    chat = client_from(spec, counted)
    return Transcript(chat, run_dir / FOLDER, counted, variable=spec.api_key_env, max_tokens=spec.max_tokens)


def settle_mode(transcript: Transcript, spec: LLMSpec, run_dir: Path) -> str | None:
    """Find out how the endpoint enforces a schema, unless the genome says or an earlier sitting found it.

    Returns:
        One line on what was found; None if there was nothing to find out.

    Raises:
        LLMError: The endpoint does not serve.
    """
    chat = transcript.client
    if spec.mode != "auto" or not isinstance(chat, Endpoint):
        return None
    path = run_dir / FOLDER / MODES_FILE
    known = canary.remembered(path, chat.base_url, chat.model)
    if known is not None:
        chat.enforce(known)
        return f"answers are asked for as {known} (found in an earlier sitting)"
    ladder = canary.climb(transcript)
    chat.enforce(ladder.mode)
    canary.remember(path, chat.base_url, chat.model, ladder.mode)
    return ladder.describe()


def proposer(genome: Genome, recipes: Recipes, chat: DescribedClient | None = None) -> Proposer:
    """The proposer that `search` and `llm` describe.

    Args:
        genome: What is searched.
        recipes: Its space and the models' short names.
        chat: From `client`; needed where `search.asks_model`.

    Raises:
        ProposerError: No proposer has that name, or it cannot be made.
        GenomeError: It cannot propose in this space.
    """
    search, space = genome.search, recipes.space
    merged = [gene for gene in space.names if not gene.startswith("train.")]
    if search.proposer == "population" and merged:
        raise GenomeError(
            "`search.proposer: population` must have one base for all individuals, but "
            f"`{merged[0]}` is a gene of the merge; fix it, or take one model."
        )
    name = "llm" if search.proposer == "warmstart" else search.proposer
    if name == "hybrid":
        name = search.guest
    options = _options(name, genome, recipes, chat)
    if search.proposer in ("hybrid", "warmstart"):
        options |= {"base": search.base, "base_options": _options(search.base, genome, recipes, chat)}
    if search.proposer == "warmstart":
        options["budget"] = search.trials
    if search.proposer == "hybrid":
        options |= {
            "guest": search.guest,
            "share": search.share,
            "warmup": search.warmup,
            "adapt": search.adapt,
            "screen": search.screen,
            "on_outage": search.on_outage,
        }
    return make(search.proposer, space, search.direction, **options)


def _options(name: str, genome: Genome, recipes: Recipes, chat: DescribedClient | None) -> dict[str, Any]:
    search = genome.search
    if name == "cma":
        return {"population": search.population, "sigma0": search.sigma0}
    if name in ("ga", "population"):
        return {"population": search.population, "strength": strength(search)}
    if name in ("placebo", "topk_mean"):
        return {"strength": strength(search)}
    if name == "llm":
        return {
            "client": chat,
            "strength": strength(search),
            "context": _context(genome, recipes),
            "mode": search.mode,
            "prompts": search.prompts,
        }
    return {}


def _context(genome: Genome, recipes: Recipes) -> Context:
    """What the language model is told of the search beyond its space."""
    methods = genome.genome.methods if genome.alone is None else []
    method = f"one of {', '.join(methods)}" if len(methods) > 1 else "".join(methods)
    if genome.train is not None:
        method += f"{', then ' if method else ''}training an adapter"
    made = "merged" if genome.train is None else "trained"
    unseen = sum(reference.params is None for reference in references(genome, recipes))
    return Context(
        goal=f"the weighted sum of the tasks' metrics of the {made} model",
        tasks=[f"{task.name} ({task.metric}, weight {task.weight:g})" for task in genome.tasks],
        models=list(recipes.labels.values()),
        method=method,
        budget=genome.search.trials - unseen,
        cards=[*(["lora"] if genome.train is not None else []), *cards(methods)],
    )


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


def check_facts(store: Store, facts: dict[str, Any]) -> dict[str, Any]:
    """Keep what the pipeline says of itself, or refuse to mix scores of different items in one run.

    Returns:
        The facts, with the rungs that the run was begun with.

    Raises:
        StoreError: The items are not those that earlier trials were scored on.
    """
    known: dict[str, Any] | None = store.meta("pipeline")
    if known is None:
        store.set_meta("pipeline", facts)
        return facts
    # A run of before there were rungs, or hashes of the items, goes on without them.
    keys = [*_SCORED, *(key for key in (*_RUNGS, "documents") if key in known)]
    different = [
        f"{key}: {known.get(key)} -> {facts.get(key)}" for key in keys if known.get(key) != facts.get(key)
    ]
    if different:
        lines = "\n".join(f"  {line}" for line in different)
        raise StoreError(
            f"the tasks give other items or weights now than those that `{store.run_dir}` was scored on:\n"
            f"{lines}\nRestore the tasks' data, choose another --run-dir, or move the earlier run aside with "
            "--fresh."
        )
    return {**facts, **{key: known.get(key) for key in _RUNGS}}
