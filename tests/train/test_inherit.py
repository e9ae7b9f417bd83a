"""Populations of weights on a real tiny model: what a child starts from, and whole runs with kill -9."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("lm_eval")

from pydantic import ValidationError  # noqa: E402
from test_run import InProcess, searched  # noqa: E402

from llmevo import genome as genomes  # noqa: E402
from llmevo.errors import GenomeError, StageError  # noqa: E402
from llmevo.genome import Genome  # noqa: E402
from llmevo.genome.train import TrainSettings  # noqa: E402
from llmevo.pipeline import Job, MergePipeline  # noqa: E402
from llmevo.proposers.population import SKETCH, Survivors, distance, notes  # noqa: E402
from llmevo.runner import finals, opening  # noqa: E402
from llmevo.store import Store  # noqa: E402
from llmevo.train import Start, Trained, Trainer, adapters, combine, methods  # noqa: E402
from llmevo.train.inherit import changes, fingerprint, inherit  # noqa: E402
from llmevo.train.products import Product  # noqa: E402
from llmevo.trial import Trial  # noqa: E402

SETTINGS = {"target_modules": ["q_proj", "v_proj"], "epochs": 1}


def dense(products: dict[str, Product]) -> dict[str, Any]:
    return {name: product.up @ product.down for name, product in products.items()}


@pytest.fixture
def parents(tiny: Any, tokenizer: Any, make_spec: Callable[..., Any], tmp_path: Path) -> list[Path]:
    """Two trained adapters: rank 4 of scale 8, and rank 2 of rsLoRA's."""
    made = []
    for number, more in enumerate([{"rank": 4}, {"rank": 2, "adapter": "rslora", "alpha": 6.0}]):
        spec = make_spec(**SETTINGS, **more)
        folder = tmp_path / f"parent{number}"
        with Trainer(spec, tiny, tokenizer, seed=0).candidate(spec.settings({}), number, "base", folder):
            made.append(folder)
    return made


def started(
    tiny: Any, start: Start, **settings: Any
) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
    """A fresh adapter that inherits: its change by module, its A and B, and its sketch."""
    given = TrainSettings(**{"rank": 8, "target_modules": ("q_proj", "v_proj"), **settings})
    config = methods.config(given, adapters.Targets(tiny), 0, 10)
    with adapters.adapted(tiny, given, config, "cand0009", 0) as adapter:
        inherit(adapter, start)
        factors = {name: p.detach().clone() for name, p in adapter.parameters().items()}
        return dense(dict(changes(adapter))), factors, fingerprint(adapter, 0)


@pytest.mark.usefixtures("untouched")
def test_a_child_starts_at_the_weighted_sum_of_its_parents(tiny: Any, parents: list[Path]) -> None:
    first, second = (dense(combine.read(folder)[0]) for folder in parents)
    start = Start(((parents[0], 0.7), (parents[1], 0.3)))
    found, factors, _ = started(tiny, start, adapter="rslora", alpha=3.0)
    assert found.keys() == first.keys()
    for name, change in found.items():
        torch.testing.assert_close(change, 0.7 * first[name] + 0.3 * second[name], atol=1e-6, rtol=0)
        assert change.abs().max() > 1e-3
    # A fresh A's size is kept, and the two directions that no parent had are fresh: they learn.
    _, fresh, _ = started(tiny, Start())
    for name, factor in factors.items():
        if ".lora_A." in name:
            assert float(factor.norm() / fresh[name].norm()) == pytest.approx(1, rel=0.05)
            assert torch.equal(factor[6:], fresh[name][6:])
        else:
            assert not factor[:, 6:].any()
    # Of a smaller rank it is the nearest matrix.
    cut, _, _ = started(tiny, start, rank=3)
    for name, change in cut.items():
        u, values, v = torch.linalg.svd(0.7 * first[name] + 0.3 * second[name])
        torch.testing.assert_close(change, u[:, :3] * values[:3] @ v[:3], atol=1e-6, rtol=0)


def test_noise_is_as_large_as_the_strength_says_and_follows_from_its_seed(
    tiny: Any, parents: list[Path]
) -> None:
    both = ((parents[0], 0.5), (parents[1], 0.5))
    _, plain, sketch = started(tiny, Start(both), rank=6)
    for strength in (0.05, 0.2):
        _, noisy, moved = started(tiny, Start(both, strength, seed=5), rank=6)
        for name, factor in noisy.items():
            gap = float((factor - plain[name]).norm() / plain[name].norm())
            assert gap == pytest.approx(strength, rel=0.25)
        assert moved != sketch
    assert started(tiny, Start(both, 0.2, seed=5), rank=6)[2] == moved
    assert started(tiny, Start(both, 0.2, seed=6), rank=6)[2] != moved


def test_a_parent_that_is_gone_is_one_line(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="a parent's adapter is of no use"):
        started(tiny, Start(((tmp_path / "gone", 1.0),)))


def test_a_child_that_is_kept_needs_its_parents_no_more(
    tiny: Any, tokenizer: Any, make_spec: Callable[..., Any], parents: list[Path], tmp_path: Path
) -> None:
    spec = make_spec(**SETTINGS)
    trainer = Trainer(spec, tiny, tokenizer, seed=0)
    start = Start(((parents[0], 0.5), (parents[1], 0.5)), 0.1, seed=3, generation=1)

    def child(folder: Path) -> tuple[Trained, list[float]]:
        with trainer.candidate(spec.settings({}), 5, "base", folder, start=start) as trained:
            return trained, trainer.losses("test")

    known = child(tmp_path / "child")
    for folder in parents:
        shutil.rmtree(folder)
    again = child(tmp_path / "child")
    assert again[0] == known[0]
    assert again[1] == pytest.approx(known[1], abs=1e-6)
    with pytest.raises(StageError, match="a parent's adapter is of no use"):
        child(tmp_path / "other")


@pytest.fixture(scope="module")
def data(tiny_folder: Path, facts_file: Path) -> dict[str, Any]:
    """Four generations of three; each training is half an epoch."""
    return {
        "genome": {"models": [str(tiny_folder)], "dtype": "float32"},
        "tasks": ["validation_loss"],
        "train": {
            "data": str(facts_file),
            "rank": 4,
            "learning_rate": {"float": [1e-3, 3e-2], "log": True},
            "batch_size": {"int": [4, 12]},
            "epochs": 0.5,
        },
        "search": {
            "trials": 14,
            "population": 3,
            "proposer": "population",
            "halving": {"enabled": False},
        },
        "evaluate": {"device": "cpu", "dtype": "float32", "finalists": 1},
        "run": {"cache": False},
    }


@pytest.fixture(scope="module")
def finished(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, InProcess]:
    run_dir = tmp_path_factory.mktemp("population") / "run"
    return run_dir, searched(Genome.model_validate(data), run_dir)


def trials_of(run_dir: Path) -> list[Trial]:
    with closing(Store.open(run_dir, readonly=True)) as store:
        return store.trials()


def test_generations_begin_where_their_parents_ended(finished: tuple[Path, InProcess]) -> None:
    run_dir, _ = finished
    trials = trials_of(run_dir)
    children = [trial for trial in trials if notes(trial)]
    assert len(children) >= 8
    for child in children:
        # It starts near what its parents had learnt, far below where training from scratch starts.
        assert child.metrics["train"]["loss_first"] < trials[1].metrics["train"]["loss_first"] - 0.3
        assert len(child.metrics[SKETCH]) == 64
    # Most stay nearer to a parent than strangers are to each other.
    near = [min(distance(child, trials[number]) for number in notes(child)["parents"]) for child in children]
    assert sum(near) / len(near) < 1.0
    best = [max(t.value for t in trials[: n + 1]) for n in range(len(trials))]
    assert best[-1] > best[4] > best[1]
    # A generation reads on where its parents did not.
    order = {Start(generation=g).order(0) for g in range(5)}
    assert len(order) == 5
    assert Start().order(7) == 7


def test_adapters_of_parents_to_be_are_kept_and_no_others(finished: tuple[Path, InProcess]) -> None:
    run_dir, _ = finished
    trials = trials_of(run_dir)
    alive = {trial.number for trial in Survivors("maximize", 3)(trials)}
    kept = {int(path.name[-4:]) for path in (run_dir / "adapters").iterdir()}
    plan = {t.number for _, t in finals.plan(trials, references=2, direction="maximize", finalists=1)}
    assert kept == alive | (plan - {0})


def same(run_dir: Path, other: Path) -> bool:
    """Whether two runs have the same trials, but for what they cost."""

    def facts(path: Path) -> list[Any]:
        return [(t.params, t.attrs, t.score, t.metrics) for t in trials_of(path)]

    return facts(run_dir) == facts(other)


_DRIVER = """
import sys
from llmevo import genome, runner
from llmevo.cli.display import NoDisplay
if __name__ == "__main__":
    path, run_dir = sys.argv[1:]
    sys.exit(runner.run(genome.load(path), open(path).read(), run_dir, observer=NoDisplay()).exit_code)
"""


@pytest.mark.slow
def test_kill_9_and_resume_gives_the_same(
    finished: tuple[Path, InProcess], data: dict[str, Any], tmp_path: Path
) -> None:
    run_dir, _ = finished
    (tmp_path / "genome.yaml").write_text(genomes.dump(Genome.model_validate(data)))
    (tmp_path / "driver.py").write_text(_DRIVER)
    command = [
        sys.executable,
        str(tmp_path / "driver.py"),
        str(tmp_path / "genome.yaml"),
        str(tmp_path / "run"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, start_new_session=True, env=environment)
    while process.poll() is None:
        # In the middle of a generation that has parents.
        if (
            Store.exists(tmp_path / "run")
            and sum(t.score is not None for t in trials_of(tmp_path / "run")) > 6
        ):
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.05)
    assert process.wait() == -signal.SIGKILL
    assert subprocess.run(command, check=False, env=environment).returncode == 0
    assert same(tmp_path / "run", run_dir)


@pytest.mark.parametrize(
    ("changes_", "message"),
    [
        ({"train": None, "tasks": ["x"]}, "needs `train`"),
        ({"adapter": "dora"}, "may be dora"),
        ({"search": {"proposer": "hybrid", "base": "population"}}, "proposes alone"),
    ],
)
def test_what_has_no_population_is_refused(
    data: dict[str, Any], changes_: dict[str, Any], message: str
) -> None:
    changed = {**data, **{key: value for key, value in changes_.items() if key != "adapter"}}
    if "adapter" in changes_:
        changed["train"] = {**data["train"], "adapter": "dora"}
    with pytest.raises(ValidationError, match=message):
        Genome.model_validate(changed)


def test_individuals_of_different_merges_are_refused(data: dict[str, Any], tiny_llamas: Any) -> None:
    from llmevo.recipe import Recipes

    merged = {"models": [str(p) for p in tiny_llamas.parents], "base_model": str(tiny_llamas.base)}
    genome = Genome.model_validate({**data, "genome": merged})
    with pytest.raises(GenomeError, match="one base for all individuals"):
        opening.proposer(genome, Recipes(genome, 4))


def test_general_and_specific_fitness_have_splits_of_their_own(
    data: dict[str, Any], facts_file: Path
) -> None:
    general = facts_file.with_name("general.jsonl")
    rows = [{"prompt": f"{n} plus {n} is", "completion": f" {2 * n}"} for n in range(12)]
    general.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpora = {"train": str(facts_file), "general": str(general), "general_test": 0.25}
    tasks = ["validation_loss", {"name": "general_loss", "weight": 0.5}]
    genome = Genome.model_validate({**data, "tasks": tasks, "train": {**data["train"], "data": corpora}})
    torch.set_num_threads(1)
    pipeline = MergePipeline(genome)
    params = pipeline._recipes.space.start()
    found = {split: pipeline.run(Job(0, params, seed=0, split=split)) for split in ("search", "holdout")}
    facts = pipeline.describe()
    assert facts["items"] == {
        "validation_loss": {"search": 8, "holdout": 8},
        "general_loss": {"search": 9, "holdout": 3},
    }
    for split, outcome in found.items():
        assert outcome.error is None
        losses = {task: outcome.metrics[task]["nll,none"] for task in facts["items"]}
        assert outcome.score.value == pytest.approx(-losses["validation_loss"] - 0.5 * losses["general_loss"])
        assert {task: len(items) for task, items in outcome.score.items.items()} == {
            task: count[split] for task, count in facts["items"].items()
        }
    parts = pipeline._trainer._data.parts
    apart = [{e.tokens.tobytes() for e in parts[part]} for part in ("general", "general_test")]
    assert not apart[0] & apart[1]
    without = {**data, "tasks": ["general_loss"]}
    with pytest.raises(ValidationError, match=r"needs `train\.data\.general`"):
        Genome.model_validate(without)


def test_a_search_ends_at_its_tokens(data: dict[str, Any], tmp_path: Path) -> None:
    search = {**data["search"], "proposer": "random", "population": 5, "tokens": 1000}
    genome = Genome.model_validate({**data, "search": search})
    searched(genome, tmp_path / "run")
    own = trials_of(tmp_path / "run")[2:]
    spent = [trial.cost["tokens"] for trial in own]
    assert sum(spent) >= 1000 > sum(spent[:-1])  # a batch is no larger than there is room for
    assert len(own) < 5
