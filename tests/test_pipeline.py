"""The pipeline on real merges of tiny Llamas and real lm-eval tasks."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from choice_task import sums, write_choice_task

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

from safetensors.torch import load_file  # noqa: E402

from llmevo import genome as genomes  # noqa: E402
from llmevo import runner  # noqa: E402
from llmevo.cli.display import NoDisplay  # noqa: E402
from llmevo.errors import GenomeError  # noqa: E402
from llmevo.genome import Genome  # noqa: E402
from llmevo.pipeline import Job, MergePipeline, Outcome  # noqa: E402


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One four-choice task, `letters`."""
    folder = tmp_path_factory.mktemp("letters")
    write_choice_task(folder, "letters", {"test": sums(range(30)), "train": sums(range(30, 34))})
    return folder


@pytest.fixture(scope="module")
def genome(tiny_llamas: Any, task_folder: Path) -> Genome:
    first, second, _ = tiny_llamas.parents
    return Genome.model_validate(
        {
            "genome": {
                "models": [str(first), str(second)],
                "base_model": str(tiny_llamas.base),
                "merge_method": "task_arithmetic",
            },
            "tasks": [{"name": "letters", "metric": "gold_logprob,none"}],
            "evaluate": {
                "task_path": [str(task_folder)],
                "dtype": "float32",
                "device": "cpu",
                "holdout": 0.2,
            },
        }
    )


@pytest.fixture(scope="module")
def pipeline(genome: Genome) -> MergePipeline:
    torch.set_num_threads(1)
    return MergePipeline(genome)


def parent(path: str) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": path}], "dtype": "bfloat16"}


def start(genome: Genome, at: float = 0.7) -> dict[str, Any]:
    from llmevo import recipe

    space = recipe.Recipes(genome, 4).space
    return space.from_unit([at] * len(space))


def test_a_job_becomes_a_score_with_its_costs(pipeline: MergePipeline, genome: Genome) -> None:
    outcome = pipeline.run(Job(3, start(genome), seed=0))
    assert outcome.error is None
    assert outcome.score is not None
    assert outcome.number == 3
    assert len(outcome.score.items["letters"]) == 24
    assert outcome.score.value == outcome.metrics["letters"]["gold_logprob,none"]
    assert set(outcome.seconds) == {"merge", "evaluate"}
    assert all(0 < value < 60 for value in outcome.seconds.values())
    assert outcome.bytes["merge"] > 100_000
    held = pipeline.run(Job(3, start(genome), seed=0, split="holdout"))
    assert held.score is not None
    assert len(held.score.items["letters"]) == 6


def test_weights_that_have_answered_are_neither_merged_nor_asked(
    genome: Genome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEVO_CACHE", str(tmp_path))
    halving = genome.search.halving.model_copy(update={"enabled": True, "first": 8})
    search = genome.search.model_copy(update={"halving": halving})
    first = MergePipeline(genome.model_copy(update={"search": search}))
    params = start(genome)
    small = first.run(Job(1, params, seed=0, rung=0))
    assert small.items == {"scored": 8, "cached": 0}
    whole = first.run(Job(1, params, seed=0))
    assert whole.items == {"scored": 16, "cached": 8}
    other = MergePipeline(genome.model_copy(update={"search": search}))  # another run
    again = other.run(Job(7, params, seed=0))
    assert again.items == {"scored": 0, "cached": 24}
    assert "merge" not in again.bytes
    assert (again.score, again.metrics) == (whole.score, whole.metrics)
    exact = other.run(Job(8, params, seed=0, exact=True))
    assert exact.items == {"scored": 24, "cached": 0}  # other arithmetic, other weights
    off = genome.model_copy(update={"run": genome.run.model_copy(update={"cache": False})})
    assert MergePipeline(off).run(Job(9, params, seed=0)).items["cached"] == 0


def test_a_parents_recipe_scores_as_the_parent_does(pipeline: MergePipeline, genome: Genome) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmevo.evaluate import Evaluator

    path = genome.genome.models[1]
    outcome = pipeline.run(Job(0, {}, seed=0, recipe=parent(path)))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    alone = Evaluator(genome, model, AutoTokenizer.from_pretrained(path), device="cpu")
    assert outcome.score == alone.evaluate("search")[0]
    base = pipeline.run(Job(1, {}, seed=0, recipe=parent(str(genome.genome.base_model))))
    assert base.score != outcome.score


@pytest.mark.parametrize(
    ("job", "error"),
    [
        (Job(1, {"nonsense": 1.0}, seed=0), r"^merge: SpaceError: `nonsense` is not a gene"),
        (Job(1, {}, seed=0, recipe={"merge_method": "no_such", "models": []}), r"^merge: "),
        (Job(1, {}, seed=0, recipe=parent("elsewhere/model")), r"^merge: .*elsewhere/model"),
    ],
)
def test_a_failed_merge_is_data_and_the_next_job_runs(
    pipeline: MergePipeline, genome: Genome, job: Job, error: str
) -> None:
    before = pipeline.run(Job(0, start(genome), seed=0))
    outcome = pipeline.run(job)
    assert (outcome.score, outcome.stage) == (None, "merge")
    assert outcome.error is not None
    assert "\n" not in outcome.error
    assert re.search(error, outcome.error)
    assert pipeline.run(Job(2, start(genome), seed=0)).score == before.score


def test_weights_that_overflow_fail_in_evaluation(pipeline: MergePipeline, genome: Genome) -> None:
    params = start(genome)
    before = pipeline.run(Job(0, params, seed=0))
    scaled = {
        "merge_method": "linear",
        "models": [{"model": genome.genome.models[0], "parameters": {"weight": 1e15}}],
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }
    outcome = pipeline.run(Job(1, {}, seed=0, recipe=scaled))
    assert outcome.score is None
    assert (outcome.stage, outcome.error) == ("evaluate", "evaluate: the model's logits are not finite.")
    assert set(outcome.seconds) == {"merge", "evaluate"}
    assert pipeline.run(Job(2, params, seed=0)).score == before.score


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (MemoryError(), "evaluate: out of memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
            "evaluate: out of memory with one row of ",
        ),
        (ZeroDivisionError("division\nby zero"), "evaluate: ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_the_model_raises_is_one_line(
    pipeline: MergePipeline, genome: Genome, raised: Exception, error: str
) -> None:
    def fail(*_: Any) -> None:
        raise raised

    hook = pipeline._merger.model.register_forward_pre_hook(fail)
    try:
        # A point of its own: answers that are kept need no model.
        outcome = pipeline.run(Job(5, start(genome, len(error) / 100), seed=0))
    finally:
        hook.remove()
    assert outcome.error is not None
    assert outcome.error.startswith(error)
    assert "\n" not in outcome.error
    assert pipeline.run(Job(6, start(genome), seed=0)).error is None


def test_ctrl_c_is_not_a_trials_failure(pipeline: MergePipeline, genome: Genome) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = pipeline._merger.model.register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(Job(5, start(genome, 0.9), seed=0))
    finally:
        hook.remove()


def test_describe_is_json(pipeline: MergePipeline) -> None:
    facts = pipeline.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["device"], facts["dtype"]) == ("cpu", "float32")
    assert facts["items"] == {"letters": {"search": 24, "holdout": 6}}
    assert math.isfinite(facts["seconds"]["models"])


def test_a_device_that_is_not_there_is_a_genome_error(genome: Genome) -> None:
    for name, message in (("cuda:9", "this machine has"), ("tpu?", "must be auto, cpu, cuda")):
        spec = genome.evaluate.model_copy(update={"device": name})
        with pytest.raises(GenomeError, match=message):
            MergePipeline(genome.model_copy(update={"evaluate": spec}))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties"])
def test_mergekit_makes_the_evaluated_weights_from_the_best_recipe(
    genome: Genome, tmp_path: Path, method: str
) -> None:
    searched = genome.model_copy(
        update={
            "genome": genome.genome.model_copy(update={"merge_method": method}),
            "search": genome.search.model_copy(update={"trials": 8, "references": False, "seed": 3}),
        }
    )
    run_dir = tmp_path / "run"
    inside = InProcess(MergePipeline(searched))
    summary = runner.run(searched, genomes.dump(searched), run_dir, observer=NoDisplay(), executor=inside)
    assert summary.best is not None
    job = runner.job_of(searched, summary.best)
    assert inside.pipeline.run(job).score == summary.best.score
    # As finalists are merged: the search itself rounds otherwise, and draws other masks.
    exact = inside.pipeline.run(replace(job, exact=True))
    assert exact.items["scored"] > 0
    evaluated = inside.pipeline._merger.model.state_dict()

    # What a user would type; the seed is that of the run, for DARE's masks.
    command = [Path(sys.executable).with_name("mergekit-yaml"), run_dir / "best" / "recipe.yaml"]
    options = ["--random-seed", "3", "--quiet"]
    subprocess.run([*command, tmp_path / "merged", *options], check=True, capture_output=True)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert len(merged) > 30
    for name, weight in merged.items():
        assert torch.equal(weight.to(evaluated[name].dtype), evaluated[name]), name


class InProcess:
    """An executor that runs its jobs at once, here, so that a test can look at the resident model."""

    workers = 1

    def __init__(self, pipeline: MergePipeline) -> None:
        self.pipeline = pipeline

    def submit(self, job: Job) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        future.set_result(self.pipeline.run(job))
        return future

    def describe(self) -> dict[str, Any]:
        return self.pipeline.describe()

    def shutdown(self, cancel: bool = False) -> None:
        """There is nothing to end."""
