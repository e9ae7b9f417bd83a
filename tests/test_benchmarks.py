"""The proposer benchmark: every arm runs, is stored, is not run again, and is reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
pytest.importorskip("optuna", reason="the `bench` extra")
pytest.importorskip("cma", reason="the `bench` extra")


@pytest.fixture(scope="module")
def bench() -> Any:
    """The script as a module, from its folder, as `python benchmarks/proposers.py` finds its neighbours."""
    sys.path.insert(0, str(_FOLDER))
    try:
        import analysis
        import arms
        import proposers
        import spaces

        yield proposers, arms, spaces, analysis
    finally:
        sys.path.remove(str(_FOLDER))


def fast_arms() -> list[str]:
    sys.path.insert(0, str(_FOLDER))
    try:
        import arms
    finally:
        sys.path.remove(str(_FOLDER))
    return [name for name in arms.arms() if name not in arms.SLOW]


@pytest.mark.parametrize("arm", fast_arms())
def test_an_arm_runs_is_stored_and_is_not_run_again(bench: Any, arm: str, tmp_path: Path) -> None:
    proposers, _, _, analysis = bench
    spaces = ["ellipsoid-4", "lora"]
    options: dict[str, Any] = {"budget": 16, "items": 50, "folder": tmp_path}
    made = proposers.sweep([arm], spaces, range(2), **options)
    assert made == (2 if arm in ("cmaes", "pycma", "optuna-cma") else 4)
    assert proposers.sweep([arm], spaces, range(2), **options) == 0
    stored = proposers.load(tmp_path)
    assert len(stored) == made
    for record in stored.values():
        assert sum(record["origins"].values()) == 16
        assert record["origins"]["first" if "first" in record["origins"] else "enqueued"] == 4
        assert analysis.at(record["best"], 16) <= analysis.at(record["chosen"], 16)
    packed = proposers.pack(tmp_path)
    assert packed.exists()
    assert not (tmp_path / "proposers.jsonl").exists()
    assert proposers.load(tmp_path) == stored


def test_all_arms_see_the_same_first_points_and_luck(bench: Any) -> None:
    proposers, *_ = bench
    firsts = {arm: proposers.run(arm, "ellipsoid-4", 3, budget=4, items=50) for arm in fast_arms()}
    curves = {json.dumps([record["chosen"], record["best"]]) for record in firsts.values()}
    assert len(curves) == 1


def test_a_torn_line_is_passed_over(bench: Any, tmp_path: Path) -> None:
    proposers, *_ = bench
    proposers.sweep(["random"], ["ellipsoid-4"], [0], budget=8, items=20, folder=tmp_path)
    with (tmp_path / "proposers.jsonl").open("a") as file:
        file.write('{"arm": "random", "spa')
    assert len(proposers.load(tmp_path)) == 1


def names(bench_spaces: Any) -> list[str]:
    return list(bench_spaces.SPACES)


def test_the_optimum_is_the_optimum_and_the_start_is_one(bench: Any) -> None:
    _, _, spaces, _ = bench
    rng = np.random.default_rng(0)
    for name in names(spaces):
        for seed in range(3):
            made = spaces.problem(name, seed)
            assert made.regret(made.optimum) == pytest.approx(0.0, abs=1e-9)
            assert made.regret(made.space.start()) == pytest.approx(1.0)
            goal = made.space.to_unit(made.optimum)
            for _ in range(100):
                near = made.space.from_unit(np.clip(goal + rng.normal(0, 0.02, len(goal)), 0, 1))
                assert made.loss(near) >= -1e-9 * made.scale
                assert made.loss(made.space.sample(rng)) >= -1e-9 * made.scale


def test_optima_of_the_merge_space_stand_on_the_boundary_and_off_the_start(bench: Any) -> None:
    _, _, spaces, _ = bench
    units = np.array([p.space.to_unit(p.optimum) for p in (spaces.problem("merge", s) for s in range(20))])
    on = (units < 1e-6) | (units > 1 - 1e-6)
    assert 0.2 < on[:, :-2].mean() < 0.6
    assert np.abs(units - 0.5).mean() > 0.2


def test_the_ratio_is_paired_and_knows_its_noise(bench: Any) -> None:
    *_, analysis = bench
    rng = np.random.default_rng(1)

    def record(arm: str, seed: int, value: float) -> dict[str, Any]:
        curve = [[1, 1.0], [20, value]]
        return {"arm": arm, "space": "merge", "seed": seed, "budget": 128, "chosen": curve, "best": curve}

    hard = np.exp(rng.normal(-2.0, 1.0, 20))
    runs = analysis.arranged(
        [record("cma", s, v) for s, v in enumerate(hard)]
        + [record("better", s, 0.5 * v * np.exp(rng.normal(0, 0.1))) for s, v in enumerate(hard)]
        + [record("other", s, v) for s, v in enumerate(np.exp(rng.normal(-2.0, 1.0, 20)))]
    )
    better = analysis.ratio(runs, "better", "cma", ["merge"], (32, 64))
    assert better.low < 0.5 * 1.05
    assert better.high < 0.6
    other = analysis.ratio(runs, "other", "cma", ["merge"], (32,))
    assert other.high / other.low > 1.5
    assert analysis.ratio(runs, "better", "cma", ["lora"], (32,)) is None
    at_start = analysis.ratio(runs, "better", "cma", ["merge"], (19,))
    assert at_start.low == at_start.high == 1.0


def test_the_report_has_verdicts_and_a_picture(bench: Any, tmp_path: Path) -> None:
    proposers, _, _, analysis = bench
    for arm in ("cma", "random", "ga", "hybrid+random"):
        proposers.sweep([arm], ["rastrigin-4"], range(2), budget=128, items=50, folder=tmp_path)
    text = analysis.report(proposers.load(tmp_path).values(), tmp_path)
    assert "hybrid with random JSON over cma" in text
    assert "NOT RUN  hybrid with the good guest" in text
    assert (tmp_path / "proposers.png").stat().st_size > 10_000
