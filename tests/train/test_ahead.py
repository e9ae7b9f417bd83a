"""Candidates that a worker trains together: their trials are what they would be alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from llmevo.genome import Genome  # noqa: E402
from llmevo.pipeline import Job, MergePipeline  # noqa: E402
from llmevo.runner import opening  # noqa: E402
from llmevo.store import Store  # noqa: E402
from llmevo.train import loop  # noqa: E402


@pytest.fixture(scope="module")
def genome(tiny_folder: Path, facts_file: Path) -> Genome:
    settings = {
        "rank": {"int": [1, 8]},
        "learning_rate": {"float": [1e-3, 1e-1]},
        "batch_size": 8,
        "loraplus_ratio": 4,
        "epochs": 1,
    }
    return Genome.model_validate(
        {
            "genome": {"models": [str(tiny_folder)], "dtype": "float32"},
            "tasks": ["validation_loss"],
            "train": {
                "data": str(facts_file),
                "adapter": {"choice": ["lora", "dora", "loraplus"]},
                **settings,
            },
            "evaluate": {"device": "cpu", "dtype": "float32"},
            "run": {"cache": False},
        }
    )


def in_folder(genome: Genome, folder: Path) -> MergePipeline:
    run = genome.run.model_copy(update={"dir": str(folder)})
    return MergePipeline(genome.model_copy(update={"run": run}))


def test_trials_are_those_of_trainings_alone(
    genome: Genome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    kinds = ["lora", "dora", "loraplus", "lora"]
    jobs = [
        Job(n, {"train.adapter": kind, "train.rank": 2 + n, "train.learning_rate": 1e-3}, 0)
        for n, kind in enumerate(kinds)
    ]
    alone = [in_folder(genome, tmp_path / "alone").run(job) for job in jobs]
    pipeline = in_folder(genome, tmp_path / "together")
    pipeline.ahead(jobs)
    taken: list[int] = []
    step = loop.Training._step
    monkeypatch.setattr(loop.Training, "_step", lambda self, n: (taken.append(n), step(self, n))[1])
    together = [pipeline.run(job) for job in jobs]
    # DoRA is trained by its own trial; of the others nothing was left to do.
    assert taken == list(range(8))
    for one, other in zip(alone, together, strict=True):
        assert one.error is None is other.error
        assert one.score is not None
        assert other.score is not None
        assert (one.number, other.score.value) == pytest.approx((one.number, one.score.value), abs=1e-5)
        assert other.metrics["train"] == pytest.approx(one.metrics["train"], abs=1e-5)
        assert other.tokens == one.tokens
        assert one.seconds.keys() == other.seconds.keys()
    for name in ("trial0000", "trial0003"):
        assert (tmp_path / "together" / "adapters" / name / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "together" / "adapters").glob("*.safetensors"))


def test_one_that_fails_fails_as_it_would_alone(
    genome: Genome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(loop, "_DIVERGED", 0.0)  # every training has diverged as soon as it is looked at
    jobs = [
        Job(n, {"train.adapter": "lora", "train.rank": 2, "train.learning_rate": 1e-3 + n / 100}, 0)
        for n in range(2)
    ]
    pipeline = in_folder(genome, tmp_path)
    pipeline.ahead(jobs)
    assert not list((tmp_path / "adapters").glob("*.safetensors"))
    for job in jobs:
        outcome = pipeline.run(job)
        assert outcome.stage == "train"
        assert "diverged" in str(outcome.error)


def test_how_many_is_asked_of_the_machine(
    tiny: Any, tokenizer: Any, make_spec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmevo.train import Trainer, pays

    def told(**settings: Any) -> tuple[int, str]:
        facts = Trainer(make_spec(**{"together": "auto", **settings}), tiny, tokenizer, seed=0).describe()
        return facts["together"], facts["together_why"]

    assert told(together="off") == (1, "as `train.together` says")
    assert told(together=6) == (6, "as `train.together` says")
    assert told(adapter="dora")[0] == 1
    assert told(batch_size=64) == (
        1,
        f"{told(batch_size=64)[1].split()[0]} tokens a step are too many to gain on a CPU",
    )
    # A clock by which a stack of two takes as long as one, of four too, and of eight ten times as long.
    monkeypatch.setattr(pays, "_wait", lambda _: None)
    times = iter([0, 9, 0, 1, 0, 1, 0, 1, 0, 10])  # the first is not counted
    monkeypatch.setattr(pays.time, "perf_counter", lambda: next(times))
    most, why = told(batch_size=4)
    assert most == 4
    assert "4 at once are 4.0 times as fast" in why


@pytest.mark.parametrize(("found", "kept"), [(None, "auto"), (4, 4), (1, "off")])
def test_a_run_that_goes_on_keeps_how_many_it_found(
    genome: Genome, tmp_path: Path, found: int | None, kept: int | str
) -> None:
    assert genome.train is not None
    assert genome.train.together == "auto"
    with Store.create(tmp_path / "run", "", genome) as store:
        if found is not None:
            store.set_meta("pipeline", {"train": {"together": found}})
        again = opening.settled(genome, store).train
        assert again is not None
        assert again.together == kept
        asked = genome.model_copy(update={"train": genome.train.model_copy(update={"together": 6})})
        chosen = opening.settled(asked, store).train
        assert chosen is not None
        assert chosen.together == 6
