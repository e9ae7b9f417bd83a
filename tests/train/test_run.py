"""Merge, train, evaluate: the pipeline, whole runs, and what they leave behind, on real tiny models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import yaml
from choice_task import sums, write_choice_task

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("lm_eval")

from llmevo import genome as genomes  # noqa: E402
from llmevo import runner  # noqa: E402
from llmevo.cli import main  # noqa: E402
from llmevo.cli.display import NoDisplay  # noqa: E402
from llmevo.genome import Genome  # noqa: E402
from llmevo.pipeline import Job, MergePipeline, Outcome  # noqa: E402
from llmevo.store import Store  # noqa: E402

PROBE = torch.tensor([[5, 6, 7, 8, 9, 10]])
TRAIN = {
    "rank": {"choice": [2, 4], "ordered": True},
    "learning_rate": {"float": [1e-3, 3e-2], "log": True},
    "batch_size": 8,
    "epochs": 2,
}


class InProcess:
    """An executor that runs its jobs at once, here, and remembers them with what became of them."""

    workers = 1

    def __init__(self, genome: Genome, run_dir: Path) -> None:
        here = genome.run.model_copy(update={"dir": str(run_dir)})
        self.pipeline = MergePipeline(genome.model_copy(update={"run": here}))
        self.done: list[tuple[Job, Outcome]] = []
        self.written: list[int | None] = []  # when the job's adapter was, after each job
        self._run_dir = run_dir

    def submit(self, job: Job) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        outcome = self.pipeline.run(job)
        self.done.append((job, outcome))
        weights = self._run_dir / "adapters" / f"trial{job.number:04d}" / "adapter_model.safetensors"
        self.written.append(weights.stat().st_mtime_ns if weights.is_file() else None)
        future.set_result(outcome)
        return future

    def describe(self) -> dict[str, Any]:
        return self.pipeline.describe()

    def shutdown(self, cancel: bool = False) -> None:
        """There is nothing to end."""


@pytest.fixture(scope="module")
def data(tiny_folder: Path, facts_file: Path) -> dict[str, Any]:
    """A genome that trains one model; random proposals, all in float32."""
    return {
        "genome": {"models": [str(tiny_folder)], "dtype": "float32"},
        "tasks": ["validation_loss"],
        "train": {"data": str(facts_file), **TRAIN},
        "search": {"trials": 5, "population": 3, "proposer": "random"},
        "evaluate": {"device": "cpu", "dtype": "float32", "finalists": 1, "reruns": 0},
        "run": {"cache": False},
    }


def searched(genome: Genome, run_dir: Path, limit: int | None = None) -> InProcess:
    torch.set_num_threads(1)
    executor = InProcess(genome, run_dir)
    runner.run(genome, genomes.dump(genome), run_dir, observer=NoDisplay(), executor=executor, limit=limit)
    return executor


@pytest.fixture(scope="module")
def finished(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, InProcess]:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    return run_dir, searched(Genome.model_validate(data), run_dir)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


def test_a_run_trains_and_compares_with_the_default(finished: tuple[Path, InProcess]) -> None:
    run_dir, _ = finished
    with Store.open(run_dir, readonly=True) as store:
        trials, held = store.trials(), {row.label: row for row in store.holdout()}
    assert [t.origin for t in trials[:2]] == ["baseline", "default"]
    assert all(t.score is not None for t in trials)
    baseline, default = trials[0], trials[1]
    assert "train" not in baseline.metrics
    assert default.value > baseline.value + 0.2
    assert default.metrics["train"]["steps"] == 16
    assert default.cost["train"] > 0
    assert default.cost["bytes"]["train"] == 4 * default.metrics["train"]["parameters"]
    # The loss is subtracted, and so is each item.
    loss = default.metrics["validation_loss"]["nll,none"]
    assert default.value == -loss
    assert -sum(default.score.items["validation_loss"]) / 8 == pytest.approx(loss)
    assert default.score.stderr > 0
    assert set(held) == {"baseline", "default", "evolved"}


def test_the_test_examples_are_read_at_the_end_and_nothing_is_trained_twice(
    finished: tuple[Path, InProcess],
) -> None:
    _, executor = finished
    splits = [job.split for job, _ in executor.done]
    assert splits == ["search"] * 5 + ["holdout"] * 3
    assert executor.describe()["items"] == {"validation_loss": {"search": 8, "holdout": 8}}
    first = {job.number: outcome for job, outcome in executor.done if job.split == "search"}
    for (job, outcome), written in zip(executor.done[5:], executor.written[5:], strict=True):
        assert outcome.score is not None
        assert outcome.score.items != first[job.number].score.items
        if job.number:
            assert outcome.metrics["train"] == first[job.number].metrics["train"]
            assert written == executor.written[job.number] is not None


def test_only_finalists_and_the_default_are_kept(finished: tuple[Path, InProcess]) -> None:
    run_dir, _ = finished
    with Store.open(run_dir, readonly=True) as store:
        evolved = max(store.trials()[2:], key=lambda trial: trial.value)
    kept = sorted(path.name for path in (run_dir / "adapters").iterdir())
    assert kept == sorted({"trial0001", f"trial{evolved.number:04d}"})


def test_best_adapter_loads_in_plain_peft_with_the_same_loss(
    finished: tuple[Path, InProcess], tiny_folder: Path, load_model: Callable[[Path], Any]
) -> None:
    run_dir, executor = finished
    with Store.open(run_dir, readonly=True) as store:
        best = max(store.trials(), key=lambda trial: trial.value)
    config = json.loads((run_dir / "best" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_folder)
    model = peft.PeftModel.from_pretrained(load_model(tiny_folder), run_dir / "best" / "adapter").eval()
    examples = executor.pipeline._trainer._data.parts["validation"]
    losses = []
    for example in examples:
        tokens = torch.from_numpy(example.tokens)[None]
        labels = torch.where(torch.from_numpy(example.targets)[None], tokens, -100)
        with torch.no_grad():
            losses.append(float(model(input_ids=tokens, labels=labels).loss))
    assert [-loss for loss in losses] == pytest.approx(best.score.items["validation_loss"], abs=1e-5)


def test_export_gives_the_merged_model(
    finished: tuple[Path, InProcess], tiny_folder: Path, load_model: Callable[[Path], Any], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    run_dir, _ = finished
    assert command("export", str(run_dir), "--out", str(tmp_path / "model")) == 0
    adapted = peft.PeftModel.from_pretrained(load_model(tiny_folder), run_dir / "best" / "adapter").eval()
    merged = load_model(tmp_path / "model")
    torch.testing.assert_close(merged(PROBE).logits, adapted(PROBE).logits, atol=2e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("Paris").input_ids
    card = (tmp_path / "model" / "README.md").read_text()
    assert "A fine-tune with an adapter that is added to the weights" in card
    assert "## Recipe" not in card
    assert "epochs 2.0" in card
    assert "tokens None" not in card
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    losers = {2, 3, 4} - {int(path.name[-4:]) for path in (run_dir / "adapters").iterdir()}
    where = ("export", str(run_dir), "--trial", str(min(losers)), "--out", str(tmp_path / "other"))
    assert command(*where) == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's name yet
def test_best_prints_settings_that_peft_and_transformers_take(
    finished: tuple[Path, InProcess], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from transformers import TrainingArguments

    run_dir, _ = finished
    assert command("best", str(run_dir)) == 0
    text = capsys.readouterr().out
    ours, theirs = text.split("from trl import SFTConfig\n")
    made: dict[str, Any] = {}
    exec(ours, made)
    trained = peft.LoraConfig.from_pretrained(run_dir / "best" / "adapter")
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "use_rslora"):
        assert getattr(made["peft_config"], name) == getattr(trained, name)

    def arguments(max_length: int | None, packing: bool, **others: Any) -> TrainingArguments:
        """TRL's SFTConfig is TrainingArguments with these two and more."""
        return TrainingArguments(**{**others, "output_dir": str(tmp_path), "report_to": "none"})

    exec(theirs.replace("SFTConfig", "arguments"), {"arguments": arguments}, made)
    with Store.open(run_dir, readonly=True) as store:
        best = max(store.trials(), key=lambda trial: trial.value)
    assert made["args"].learning_rate == best.params["train.learning_rate"]
    assert made["args"].per_device_train_batch_size == 8
    assert made["args"].num_train_epochs == 2
    assert made["args"].warmup_steps == 0  # one step here, whose learning rate is the full one
    assert command("best", str(run_dir), "--axolotl") == 0
    yaml_text = capsys.readouterr().out
    assert yaml.safe_load(yaml_text)["learning_rate"] == best.params["train.learning_rate"]
    assert command("best", str(run_dir), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["python"], found["axolotl"]) == (text, yaml_text)


@pytest.mark.parametrize("verb", ["status", "show", "report", "validate", "preview"])
def test_the_other_commands_take_such_a_run(
    finished: tuple[Path, InProcess], verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_dir, _ = finished
    with Store.open(run_dir, readonly=True) as store:
        (tmp_path / "genome.yaml").write_text(genomes.dump(store.genome))
    arguments = {
        "status": ["status", str(run_dir)],
        "show": ["show", str(run_dir), "1"],
        "report": ["report", str(run_dir), "--out", str(tmp_path / "report.html")],
        "validate": ["validate", str(tmp_path / "genome.yaml")],
        "preview": ["run", str(tmp_path / "genome.yaml"), "--dry-run", "--run-dir", str(tmp_path / "new")],
    }[verb]
    assert command(*arguments) == 0
    shown = capsys.readouterr().out
    expected = {
        "status": "1 default",
        "show": "train.learning_rate",
        "report": "report.html",
        "validate": "valid (genome, tasks, parents, examples, hyperparameters); 2 genes, 2 references",
        "preview": "baseline, default",
    }[verb]
    assert expected in shown
    if verb == "report":  # the best is an adapter on one model, no merge
        html = (tmp_path / "report.html").read_text()
        assert "PeftModel.from_pretrained(model, &#x27;" in html
        assert "mergekit-yaml" not in html


def test_a_dry_run_says_what_is_trained_and_what_is_held_out(
    finished: tuple[Path, InProcess], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_dir, _ = finished
    with Store.open(run_dir, readonly=True) as store:
        genome, cost = store.genome, [trial.cost for trial in store.trials()]
    (tmp_path / "genome.yaml").write_text(genomes.dump(genome))
    assert command("run", str(tmp_path / "genome.yaml"), "--dry-run", "--run-dir", str(run_dir)) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:10])
    file = genome.train.data.train
    assert "method" not in lines
    assert lines["model"] == f"{genome.alone}, not merged"
    assert lines["training"] == f"on {file}; batch_size 8; epochs 2"
    assert lines["held"] == f"out  10% of {file}"
    arguments = ["run", str(tmp_path / "genome.yaml"), "--dry-run", "--json", "--run-dir"]
    assert command(*arguments, str(run_dir)) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] == 0  # it is over
    again = 2 * (genome.evaluate.finalists + 1)
    assert command(*arguments, str(run_dir.parent / "another"), "--set", "evaluate.reruns=2") == 0
    found = json.loads(capsys.readouterr().out)
    mean = sum(sum(v for k, v in c.items() if isinstance(v, float)) for c in cost) / len(cost)
    assert f"{again} are trainings with other seeds" in found["estimate_from"]
    assert found["seconds"] == pytest.approx(mean * (genome.search.trials + again), rel=0.5)


@pytest.mark.slow
def test_minimising_the_loss_finds_the_same_trials(
    finished: tuple[Path, InProcess], data: dict[str, Any], tmp_path: Path
) -> None:
    run_dir, _ = finished
    genome = Genome.model_validate({**data, "search": {**data["search"], "direction": "minimize"}})
    searched(genome, tmp_path / "run")
    with Store.open(run_dir, readonly=True) as a, Store.open(tmp_path / "run", readonly=True) as b:
        pairs = list(zip(a.trials(), b.trials(), strict=True))
    assert all(one.params == two.params and one.value == -two.value for one, two in pairs)
    # Items say "more is better" in either direction.
    assert all(one.score.items == two.score.items for one, two in pairs)


@pytest.mark.slow
def test_a_run_that_is_continued_ends_as_an_uninterrupted_one(
    finished: tuple[Path, InProcess], data: dict[str, Any], tmp_path: Path
) -> None:
    run_dir, _ = finished
    genome = Genome.model_validate(data)
    searched(genome, tmp_path / "run", limit=3)
    searched(genome, tmp_path / "run")
    with Store.open(run_dir, readonly=True) as a, Store.open(tmp_path / "run", readonly=True) as b:
        assert [t.score for t in a.trials()] == [t.score for t in b.trials()]
        assert [row.score for row in a.holdout()] == [row.score for row in b.holdout()]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One four-choice lm-eval task."""
    folder = tmp_path_factory.mktemp("letters")
    write_choice_task(folder, "letters", {"test": sums(range(20))})
    return folder


@pytest.fixture(scope="module")
def both(tiny_llamas: Any, data: dict[str, Any], letters: Path) -> Genome:
    """Merge and train, scored by an lm-eval task and the loss."""
    first, second, _ = tiny_llamas.parents
    merged = {"models": [str(first), str(second)], "base_model": str(tiny_llamas.base)}
    return Genome.model_validate(
        {
            **data,
            "genome": {**merged, "merge_method": "task_arithmetic", "dtype": "float32"},
            "tasks": [
                {"name": "letters", "metric": "gold_logprob,none", "weight": 2.0},
                {"name": "validation_loss", "weight": 0.5},
            ],
            "evaluate": {**data["evaluate"], "task_path": [str(letters)]},
        }
    )


@pytest.mark.parametrize("adapter", ["lora", pytest.param("pissa", marks=pytest.mark.slow)])
def test_merge_then_train_then_evaluate(both: Genome, adapter: str) -> None:
    torch.set_num_threads(1)
    assert both.train is not None
    spec = both.train.model_copy(update={"adapter": adapter, "rank": 4, "learning_rate": 1e-2})
    genome = both.model_copy(update={"train": spec})
    pipeline = MergePipeline(genome)
    model = pipeline._merger.model
    places = [p.data_ptr() for p in model.parameters()]
    params = dict.fromkeys(pipeline._recipes.space.names, 0.3)
    recipe = pipeline._recipes.recipe(params)
    plain = pipeline.run(Job(0, {}, seed=0, recipe=recipe))
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trained = pipeline.run(Job(1, params, seed=0))
    assert plain.error is None
    assert trained.error is None
    assert set(plain.seconds) == {"merge", "evaluate"}
    assert set(trained.seconds) == {"merge", "train", "evaluate"}
    # The score is the weighted sum of both terms, and the training moves both.
    assert trained.score.value == pytest.approx(
        2 * trained.metrics["letters"]["gold_logprob,none"]
        - 0.5 * trained.metrics["validation_loss"]["nll,none"]
    )
    assert set(trained.score.items) == {"letters", "validation_loss"}
    assert trained.metrics["validation_loss"] != plain.metrics["validation_loss"]
    assert trained.metrics["letters"] != plain.metrics["letters"]
    # The merge is what it was, in the same memory, and a second time the same comes out.
    assert [p.data_ptr() for p in model.parameters()] == places
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert pipeline.run(Job(2, {}, seed=0, recipe=recipe)).score == plain.score
    assert pipeline.run(Job(3, params, seed=0)).score == trained.score
    facts = pipeline.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["items"] == {
        "letters": {"search": 14, "holdout": 6},
        "validation_loss": {"search": 8, "holdout": 8},
    }
    assert (facts["weights"], facts["signs"]) == (
        {"letters": 2.0, "validation_loss": 0.5},
        {"letters": 1, "validation_loss": -1},
    )


def test_a_failed_training_is_data_and_the_next_job_runs(both: Genome) -> None:
    assert both.train is not None
    pipeline = MergePipeline(both)
    params = pipeline._recipes.space.start()
    before = pipeline.run(Job(0, params, seed=0))
    trainer = pipeline._trainer
    pipeline._trainer = None  # as a genome without `train` has it
    untrained = pipeline.run(Job(1, params, seed=0))
    pipeline._trainer = trainer
    tokens = both.train.model_copy(update={"tokens": 2, "epochs": None})
    trainer._spec = tokens
    failed = pipeline.run(Job(2, params, seed=0))
    assert (failed.score, failed.stage) == (None, "train")
    assert failed.error.startswith("train: the budget has no token to learn")
    assert math.isfinite(failed.seconds["train"])
    trainer._spec = both.train
    assert pipeline.run(Job(3, params, seed=0)).score == before.score
    assert untrained.score.items["letters"] != before.score.items["letters"]
