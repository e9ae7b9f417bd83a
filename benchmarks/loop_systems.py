"""The systems that `loop.py` compares, each on the same candidates, each in processes of its own.

Every function evaluates some candidates and returns one row for each of them: seconds of `merge` and
`evaluate`, `wall` from one finished candidate to the next, the accuracy of each task. What happens once a run
(imports, loading the parents, reading the tasks) is `start` and no candidate's, except for the command line,
which does it all for each candidate.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from loop_data import BASE, CACHE, TASKS

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]
WARM = 0  # the candidate that llmevo evaluates first, uncounted: the models are loaded meanwhile

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GOMP_SPINCOUNT": "5000",
    "TQDM_DISABLE": "1",
    "LLMEVO_CACHE": "off",
}


@dataclass(frozen=True)
class Setting:
    """What is evaluated, and on what.

    Args:
        method: The merge method.
        items: Questions, all tasks together.
        threads: Of each system.
        evolve: The python of mergekit-evolve's environment.
        prefix: Put before each measured command (`taskset -c 0,1`, say).
        batch_size: Of lm-eval on the command line.
        dtype: Of the evaluated model.
    """

    method: str
    items: int
    threads: int = 2
    evolve: Path = HERE.parent / ".venv-evolve" / "bin" / "python"
    prefix: tuple[str, ...] = ()
    batch_size: str = "16"
    dtype: str = "bfloat16"
    paths: dict[str, Path] = field(default_factory=dict)


def _environment(setting: Setting) -> dict[str, str]:
    return {**os.environ, **_ENVIRONMENT, "OMP_NUM_THREADS": str(setting.threads)}


def _run(setting: Setting, command: Sequence[str]) -> None:
    done = subprocess.run(
        [*setting.prefix, *command], env=_environment(setting), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")


def llmevo(
    setting: Setting, candidates: Sequence[int], *, mode: str = "fast", dtype: str | None = None
) -> tuple[float, list[Row]]:
    """`llmevo run` with the candidates as warm starts, which are evaluated first and in order.

    Args:
        setting: What is evaluated.
        candidates: Their numbers.
        mode: Of the merge.
        dtype: Of the evaluated model; None for that of the setting.
    """
    search = {"trials": len(candidates) + 1, "proposer": "random", "halving": {"enabled": False}}
    lines, began = _llmevo_run(setting, (WARM, *candidates), search, mode, dtype or setting.dtype)
    return _rows_of_llmevo(lines, candidates, began)


def llmevo_search(setting: Setting, candidates: Sequence[int]) -> tuple[float, list[Row]]:
    """`llmevo run` as it comes: one batch of as many candidates, drawn from the genome's space and halved.

    Who drops out after a part of the items costs less, so a candidate's seconds are the batch's mean.
    """
    count = len(candidates)
    search = {"trials": count + 1, "population": count, "proposer": "random"}
    lines, began = _llmevo_run(setting, (WARM,), search, "fast", "auto")
    finished = _finished(lines)
    (first, _), (last, _) = finished[0], finished[-1]
    costs = [trial["cost"] for _, trial in finished[1:]]
    if len(costs) != count:
        raise RuntimeError(f"{count} candidates were to be evaluated, and {len(costs)} were")
    row = {part: statistics.fmean(cost[part] for cost in costs) for part in ("merge", "evaluate", "store")}
    row |= {"wall": (last - first) / count, "items": sum(cost["items"]["scored"] for cost in costs) / count}
    return first - began, [{**row, "candidate": number} for number in candidates]


def _llmevo_run(
    setting: Setting, warm: Sequence[int], search: dict[str, Any], mode: str, dtype: str
) -> tuple[list[tuple[float, str]], float]:
    """The lines of a run's JSON display, each with the moment at which it was read; and when it began."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        genome = yaml.safe_load(setting.paths["genome"].read_text())
        genome["warm_start"] = [str(setting.paths["recipes"] / f"{number}.yaml") for number in warm]
        genome["search"] = {"references": False, **search}
        genome["merge"] = {"mode": mode}
        genome["evaluate"] = {
            "task_path": [str(setting.paths["tasks"])],
            "holdout": 0.0,
            "dtype": dtype,
            "device": "cpu",
        }
        (folder / "genome.yaml").write_text(yaml.safe_dump(genome, sort_keys=False))
        call = "import sys; from llmevo.cli import main; sys.exit(main())"
        command = [*setting.prefix, sys.executable, "-c", call, "run", str(folder / "genome.yaml")]
        command += ["--run-dir", str(folder / "run"), "--display", "json"]
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=_environment(setting),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=HERE.parent,
        )
        assert process.stderr is not None
        lines = [(time.perf_counter(), line) for line in process.stderr]
        if process.wait():
            raise RuntimeError("llmevo run failed:\n" + "".join(line for _, line in lines)[-3000:])
    return lines, began


def _finished(lines: Sequence[tuple[float, str]]) -> list[tuple[float, dict[str, Any]]]:
    """The finished trials, each with the moment at which that was read."""
    found = []
    for moment, line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # a warning of a library
        if event.get("event") == "finished":
            found.append((moment, event["trial"]))
    return found


def _rows_of_llmevo(
    lines: Sequence[tuple[float, str]], candidates: Sequence[int], began: float
) -> tuple[float, list[Row]]:
    """A row for each candidate after the warm one."""
    finished = _finished(lines)
    rows = []
    for (before, _), (moment, trial), number in zip(finished, finished[1:], candidates, strict=False):
        if trial["score"] is None:
            raise RuntimeError(f"candidate {number} failed: {trial['error']}")
        cost = trial["cost"]
        rows.append(
            {
                "candidate": number,
                "wall": moment - before,
                "merge": cost["merge"],
                "evaluate": cost["evaluate"],
                "propose": cost["propose"],
                "store": cost["store"],
                "tasks": {task: trial["metrics"][task]["acc,none"] for task in TASKS},
            }
        )
    return finished[0][0] - began, rows


def evolve(
    setting: Setting, candidates: Sequence[int], *, threads: int = 2, batch_size: int = 1
) -> tuple[float, list[Row]]:
    """mergekit-evolve's in-memory evaluator; see `evolve/driver.py`."""
    with tempfile.TemporaryDirectory() as name:
        out, arrays = Path(name) / "rows.json", Path(name) / "candidates.json"
        known = json.loads(setting.paths["candidates"].read_text())
        arrays.write_text(json.dumps([known[number] for number in candidates]))
        command = [str(setting.evolve), str(HERE / "evolve" / "driver.py"), str(setting.paths["genome"])]
        command += [str(arrays), str(setting.paths["tasks"]), "--count", str(len(candidates))]
        command += ["--threads", str(threads), "--batch-size", str(batch_size), "--out", str(out)]
        _run(setting, command)
        written = json.loads(out.read_text())
    rows = [{**row, "candidate": number} for row, number in zip(written["rows"], candidates, strict=True)]
    return written["start"], rows


def command_line(setting: Setting, candidates: Sequence[int]) -> tuple[float, list[Row]]:
    """For each candidate `mergekit-yaml` and then `lm-eval run`, as two processes.

    The merged weights stay in `.cache/loop/merged/METHOD/NUMBER` for the comparison of weights.
    """
    scripts = Path(sys.executable).parent
    rows = []
    for number in candidates:
        merged = CACHE / "merged" / setting.method / str(number)
        shutil.rmtree(merged, ignore_errors=True)
        started = time.perf_counter()
        recipe = setting.paths["recipes"] / f"{number}.yaml"
        command = [str(scripts / "mergekit-yaml"), str(recipe), str(merged)]
        _run(setting, [*command, "--copy-tokenizer", "--random-seed", "0", "--quiet"])
        between = time.perf_counter()
        tasks = lm_eval(setting, merged, scripts)
        ended = time.perf_counter()
        rows.append(
            {
                "candidate": number,
                "wall": ended - started,
                "merge": between - started,
                "evaluate": ended - between,
                "tasks": tasks,
            }
        )
    return 0.0, rows


def lm_eval(setting: Setting, model: Path, scripts: Path) -> dict[str, float]:
    """Accuracies of a model by lm-eval's command line."""
    with tempfile.TemporaryDirectory() as name:
        command = [str(scripts / "lm_eval"), "run", "--model", "hf", "--device", "cpu"]
        command += ["--model_args", f"pretrained={model},dtype={setting.dtype}"]
        command += ["--tasks", ",".join(TASKS), "--include_path", str(setting.paths["tasks"])]
        command += ["--batch_size", setting.batch_size, "--output_path", name]
        _run(setting, command)
        (result,) = Path(name).glob("**/results*.json")
        results = json.loads(result.read_text())["results"]
    return {task: results[task]["acc,none"] for task in TASKS}


SYSTEMS: dict[str, Callable[[Setting, Sequence[int]], tuple[float, list[Row]]]] = {
    "llmevo": llmevo,
    "llmevo, own dtype": lambda setting, candidates: llmevo(setting, candidates, dtype="auto"),
    "llmevo, as it comes": llmevo_search,
    "llmevo, exact": lambda setting, candidates: llmevo(setting, candidates, mode="exact"),
    "mergekit-evolve": lambda setting, candidates: evolve(setting, candidates, threads=2),
    "mergekit-evolve, 1 thread": lambda setting, candidates: evolve(setting, candidates, threads=1),
    "mergekit-evolve, batches of 16": lambda setting, candidates: evolve(setting, candidates, batch_size=16),
    "command line": command_line,
}
"""`mergekit-evolve, 1 thread` is what Ray gives its actor; the others are more than what is published.

`llmevo, own dtype` lets `evaluate.dtype` be `auto`: the faster of bfloat16 and float32 on this CPU."""

__all__ = ["BASE", "SYSTEMS", "Row", "Setting"]
