"""The check of the tasks before a run: what exists, what it measures, what may be tuned on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval")

from llmevo.errors import GenomeError
from llmevo.evaluate import check_tasks
from llmevo.evaluate.tasks import task_manager
from llmevo.genome import Genome


def genome(folder: Path | None, *tasks: dict[str, Any]) -> Genome:
    evaluate = {"task_path": [str(folder)]} if folder else {}
    return Genome.model_validate(
        {"genome": {"models": ["a", "b"]}, "tasks": list(tasks), "evaluate": evaluate}
    )


def test_importing_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'lm_eval', 'transformers', 'datasets', 'scipy'} & set(sys.modules)"
    code = f"import sys, llmevo.evaluate, llmevo.stats, llmevo.pipeline; sys.exit(str({heavy} or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    "metric", ["acc,none", "acc", "acc_norm,none", "brier_score,none", "gold_logprob,none", "gold_margin"]
)
def test_metrics_that_a_task_has_pass(task_folder: Path, metric: str) -> None:
    check_tasks(genome(task_folder, {"name": "money", "metric": metric}), allow_benchmarks=False)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "mony", "metric": "acc"}, r"names 'mony', which lm-eval does not know; did you mean money"),
        (
            {"name": "money", "metric": "f1,none"},
            r"asks 'money' for 'f1,none', but this task has acc,none, acc_norm",
        ),
        ({"name": "sums", "metric": "exact_match,none"}, r"has exact_match,raw, exact_match,number"),
        (
            {"name": "prose", "metric": "acc"},
            r"has word_perplexity,none, byte_perplexity,none, bits_per_byte",
        ),
        (
            {"name": "coins", "metric": "acc_norm"},
            r"asks the group 'coins' for 'acc_norm', but it aggregates acc;",
        ),
        ({"name": "easy"}, r"'easy', a tag without a score of its own; name its tasks: money"),
    ],
)
def test_what_a_task_does_not_have_is_named(
    task_folder: Path, monkeypatch: pytest.MonkeyPatch, task: dict[str, Any], message: str
) -> None:
    # lm-eval's own 14,000 tasks take seconds to index and are not what this is about.
    local = task_manager(genome(task_folder, {"name": "money"}))
    monkeypatch.setattr("llmevo.evaluate.tasks.task_manager", lambda _genome: local)
    with pytest.raises(GenomeError, match=message):
        check_tasks(genome(task_folder, task), allow_benchmarks=False)


def test_local_tasks_do_not_index_lm_evals(task_folder: Path) -> None:
    manager = task_manager(genome(task_folder, {"name": "money"}, {"name": "coins"}))
    assert set(manager.all_tasks) == {"money", "money2", "sums", "prose", "cloze", "coins", "mine", "easy"}


@pytest.mark.parametrize("name", ["gsm8k", "mmlu_anatomy", "arc_challenge", "leaderboard_bbh", "piqa"])
def test_benchmarks_are_refused_before_anything_loads(name: str) -> None:
    with pytest.raises(GenomeError, match=rf"names {name}, a public benchmark .*--allow-benchmark-tasks"):
        check_tasks(genome(None, {"name": name}), allow_benchmarks=False)


def test_a_local_task_may_have_a_benchmarks_name(task_folder: Path, tmp_path: Path) -> None:
    own = yaml.safe_load((task_folder / "money.yaml").read_text())
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**own, "task": "piqa"}))
    check_tasks(genome(tmp_path, {"name": "piqa"}), allow_benchmarks=False)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(GenomeError, match=r"`evaluate\.task_path` must name folders, but .*nowhere"):
        check_tasks(genome(tmp_path / "nowhere", {"name": "x"}), allow_benchmarks=False)


def test_checking_runs_no_code_of_a_task(tmp_path: Path, task_folder: Path) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('ran')\ndef score(doc, results): return {}\n")
    own = (task_folder / "money.yaml").read_text().replace("task: money", "task: trapped")
    (tmp_path / "trap.yaml").write_text(own + "process_results: !function trap.score\n")
    check_tasks(genome(tmp_path, {"name": "trapped", "metric": "whatever"}), allow_benchmarks=False)


@pytest.mark.slow
def test_lm_evals_own_tasks(task_folder: Path, tmp_path: Path) -> None:
    check_tasks(genome(None, {"name": "gsm8k", "metric": "exact_match,strict-match"}), allow_benchmarks=True)
    with pytest.raises(GenomeError, match=r"does not know; did you mean hellaswag"):
        check_tasks(genome(None, {"name": "helaswag"}), allow_benchmarks=False)
    with pytest.raises(GenomeError, match=r"names mine \(which holds gsm8k\), a public benchmark"):
        check_tasks(genome(task_folder, {"name": "mine"}), allow_benchmarks=False)
    (tmp_path / "bad.yaml").write_text("task: [unclosed\n")
    with pytest.raises(GenomeError, match=r"cannot be read: bad\.yaml \("):
        check_tasks(genome(tmp_path, {"name": "my_own_thing"}), allow_benchmarks=False)
