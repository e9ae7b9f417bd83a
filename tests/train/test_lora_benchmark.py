"""The search benchmark: every arm runs and is stored, and intervals hold."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("optuna", reason="the `bench` extra")
torch = pytest.importorskip("torch")

from llmevo.genome.train import TrainSettings  # noqa: E402
from llmevo.space import Categorical, Float, Params, Space  # noqa: E402

_FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
ITEMS = 30


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The script and its neighbours as modules, from their folder."""
    sys.path.insert(0, str(_FOLDER))
    names = ("lora_search", "lora_candidates", "lora_analysis")
    try:
        yield tuple(importlib.import_module(name) for name in names)
    finally:
        sys.path.remove(str(_FOLDER))


class Hills:
    """Candidates that cost nothing: the loss is a function of the settings, with luck from the seed."""

    space = Space(
        {
            "train.learning_rate": Float(5e-5, 3e-3, log=True, init=3e-4),
            "train.adapter": Categorical("lora", "rslora", init="lora"),
        }
    )

    def __init__(self) -> None:
        self.records: dict[str, Any] = {}

    def settings(self, params: Params, times: int = 1) -> TrainSettings:
        rate, adapter = params["train.learning_rate"], str(params["train.adapter"])
        return TrainSettings(learning_rate=float(rate), adapter=adapter, tokens=100 * times)

    def score(self, settings: TrainSettings, seed: int, test: Callable[[float], bool]) -> dict[str, Any]:
        key = f"{settings.learning_rate} {settings.adapter} {settings.tokens} {seed}"
        record: dict[str, Any] = {"key": key, "settings": asdict(settings)}
        if settings.learning_rate > 2e-3:
            record["error"] = "train: the loss diverged"
        else:
            loss = abs(np.log(settings.learning_rate / 1e-3)) + np.random.default_rng(seed).random() / 10
            record |= {"validation": [float(loss)] * ITEMS, "tokens": settings.tokens}
            if test(float(loss)):
                record["test"] = [float(loss) + 0.01] * ITEMS
        self.records[key] = record | {"test": record.get("test") or self.records.get(key, {}).get("test")}
        return record


FAST = ("default", "default again", "default long", "random", "optuna-tpe", "cma", "ga", "hybrid+placebo")


@pytest.fixture(scope="module")
def searched(bench: Any) -> dict[str, Any]:
    """Every arm but the real model's, with two seeds: candidates and runs by key."""
    search, *_ = bench
    hills = Hills()
    runs = [search.run(arm, seed, hills) for arm in FAST for seed in range(2)]
    tested = {key: {k: v for k, v in r.items() if v is not None} for key, r in hills.records.items()}
    return tested | {run["key"]: run for run in runs}


@pytest.mark.parametrize("arm", FAST)
def test_an_arm_spends_its_trainings_and_hands_over_the_best(
    bench: Any, searched: dict[str, Any], arm: str
) -> None:
    search, candidates, analysis = bench
    for seed in range(2):
        run = searched[f"{arm}/{seed}"]
        made = [searched[key] for key in run["candidates"]]
        assert len(made) == (1 if arm in ("default", "default long") else search.TRAININGS)
        assert made[0]["settings"]["learning_rate"] == 3e-4
        finished = [record for record in made if "error" not in record]
        best = min(finished, key=lambda record: candidates.mean(record["validation"]))
        assert run["best"] == best["key"]
        kept = analysis.incumbents(searched, run)
        assert kept[-1]["key"] == best["key"]
        assert all("test" in record for record in kept)
        losses = [candidates.mean(record["validation"]) for record in kept]
        assert losses == sorted(losses, reverse=True)


def test_the_same_run_again_is_the_same(bench: Any, searched: dict[str, Any]) -> None:
    search, *_ = bench
    for arm in ("optuna-tpe", "hybrid+placebo"):
        assert search.run(arm, 1, Hills())["candidates"] == searched[f"{arm}/1"]["candidates"]


def test_what_is_stored_is_not_trained_again(bench: Any, tmp_path: Path) -> None:
    search, candidates, _ = bench
    store = candidates.Store(tmp_path / "lora.jsonl")
    search.sweep(["cma"], [0], store, Hills())
    with (tmp_path / "lora.jsonl").open("a") as file:
        file.write('{"key": "cma/1", "ar')  # the machine went down
    again = candidates.Store(tmp_path / "lora.jsonl")
    assert again.records == store.records
    packed = search.pack(again.records, tmp_path / "packed.jsonl.xz")
    assert candidates.Store(tmp_path / "none.jsonl", packed).records == store.records
    search.sweep(["cma"], [0], again, None)  # nothing is left to do for candidates


def test_the_long_training_has_the_settings_that_random_chose(bench: Any, tmp_path: Path) -> None:
    search, candidates, _ = bench
    store = candidates.Store(tmp_path / "lora.jsonl")
    search.sweep(["random"], [0], store, Hills())
    with pytest.raises(KeyError):
        candidates.Candidates(store).chosen("random", 0, 9)  # the run is there, its candidates are not
    best = store.records["random/0"]["best"]
    settings = TrainSettings(learning_rate=1e-3, adapter="rslora", rank=8, tokens=4000)
    store.add({"key": best, "settings": asdict(settings)})
    assert candidates.Candidates(store).chosen("random", 0, 9) == replace(settings, tokens=36000)


def test_tables_and_figure_name_every_arm(bench: Any, searched: dict[str, Any], tmp_path: Path) -> None:
    _, _, analysis = bench
    text = analysis.report(searched, tmp_path)
    for arm in FAST:
        assert f"| {arm} | 2 |" in text
    assert (tmp_path / "lora-search.png").stat().st_size > 10_000


def test_the_interval_of_a_difference_covers_seeds_and_examples(bench: Any) -> None:
    _, _, analysis = bench
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(30):
        seeds, items = rng.normal(0, 0.05, (5, 1)), rng.normal(0, 0.2, (1, 40))
        apart = 0.1 + seeds + items + rng.normal(0, 0.1, (5, 40))
        found = analysis.difference(apart, np.zeros_like(apart))
        assert found.low < found.estimate < found.high
        covered += found.low <= 0.1 <= found.high
    assert covered >= 25  # five seeds are few
    same = analysis.difference(apart, apart)
    assert (same.low, same.estimate, same.high) == (0, 0, 0)
