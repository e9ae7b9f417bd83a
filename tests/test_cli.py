"""The command line as a user meets it: exit codes, one-line errors, results on stdout."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from choice_task import sums, write_choice_task
from rich.console import Console
from search_run import FunctionExecutor, finished, genome_data

from llmevo import cli, runner
from llmevo import genome as genomes
from llmevo.cli.display import JsonDisplay, PlainDisplay, RichDisplay, choose, sparkline
from llmevo.store import Store

pytest.importorskip("mergekit")

_ROOT = Path(__file__).resolve().parent.parent


class Called:
    """What a command printed and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err


@pytest.fixture
def llmevo(capfd: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> Called:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Called(int(ended.value.code or 0), out, err)

    return call


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def task_genome(tmp_path: Path) -> Path:
    """A genome whose tasks are on this machine, and whose models are not."""
    (tmp_path / "tasks").mkdir()
    data = genome_data()
    for spec in data["tasks"]:
        write_choice_task(tmp_path / "tasks", spec["name"], {"test": sums(range(8))})
    data["evaluate"]["task_path"] = [str(tmp_path / "tasks")]
    path = tmp_path / "genome.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def one_line(called: Called) -> str:
    lines = called.err.splitlines()
    assert len(lines) == 1, called.err
    assert lines[0].startswith("error: ")
    assert called.out == ""
    return lines[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("genome: [unclosed", "not YAML"),
        ("genome: {models: [a, b]}\ntasks: [{name: t}]\nserach: {trials: 3}\n", "`search`"),
        ("genome: {models: [a, b]}\n", "`tasks` is missing"),
        ("- a list\n", "must be a mapping"),
        (
            "genome: {models: [a, b], base_model: c}\ntasks: [{name: t}]\nsearch: {proposer: cmaes}\n",
            "Did you mean 'cma'?",
        ),
    ],
)
@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_wrong_genome_is_one_line_and_exit_2(
    llmevo: Any, tmp_path: Path, text: str, said: str, command: str
) -> None:
    path = tmp_path / "genome.yaml"
    path.write_text(text)
    called = llmevo(command, path)
    assert called.code == 2
    assert said in one_line(called)
    assert os.listdir(tmp_path) == ["genome.yaml"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "Missing argument 'GENOME'"),
        (["run", "{genome}", "--trials", "0"], "--trials"),
        (["run", "{genome}", "--trials", "many"], "--trials"),
        (["run", "{genome}", "--display", "fancy"], "--display"),
        (["run", "{genome}", "--set", "search.trials"], "KEY=VALUE"),
        (["run", "{genome}", "--set", "search.trails=3"], "search.trials"),
        (["run", "{genome}", "--set", "search.trials=lots"], "search.trials"),
        (["run", "{genome}", "--proposer", "gaa"], "Did you mean 'ga'?"),
        (["run", "{genome}", "--nope"], "No such option"),
        (["frobnicate"], "No such command"),
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["status", "nowhere"], "nowhere"),
        (["show", "{run}", "999"], "0 to 23"),
        (["show", "{run}", "two"], "TRIAL"),
        (["export", "{run}"], "--out"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    llmevo: Any, task_genome: Path, run_dir: Path, arguments: list[str], said: str
) -> None:
    called = llmevo(*(a.format(genome=task_genome, run=run_dir) for a in arguments))
    assert called.code == 2
    assert said in one_line(called)


def test_a_directory_without_a_run_is_exit_1(llmevo: Any, tmp_path: Path) -> None:
    called = llmevo("status", tmp_path)
    assert called.code == 1
    assert "has no run in it" in one_line(called)


def test_an_unforeseen_error_hides_its_traceback_until_asked(
    llmevo: Any, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("llmevo.report.findings.load", fail)
    called = llmevo("status", run_dir)
    assert called.code == 1
    assert one_line(called) == "error: RuntimeError: first line second line (-v shows where)"
    loud = llmevo("status", run_dir, "-v")
    assert loud.code == 1
    assert "Traceback" in loud.err


def test_a_missing_extra_is_named() -> None:
    genome = _ROOT / "genomes" / "slerp-qwen2.5-1.5b.yaml"
    code = (
        "import sys; sys.modules['mergekit'] = None\n"  # as if it were not installed
        f"from llmevo import cli; cli.main(['validate', {str(genome)!r}, '--offline'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        'error: this needs the package mergekit, of the extra `lm`: pip install "llmevo[lm]"\n'
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["run", "--help"], ["export", "-h"]])
def test_help_goes_to_stdout(llmevo: Any, arguments: list[str]) -> None:
    called = llmevo(*arguments)
    assert called.code == 0
    assert "Usage: llmevo" in called.out
    assert called.err == ""


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom llmevo import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'pydantic', 'scipy', 'openai', 'mergekit', 'matplotlib'}"
        " & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() in ("[]", "['pydantic']")  # typer itself imports pydantic


def test_version(llmevo: Any) -> None:
    import llmevo as package

    assert llmevo("--version").out == f"llmevo {package.__version__}\n"


def snapshot(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


def test_a_dry_run_says_what_would_happen_and_writes_nothing(
    llmevo: Any, task_genome: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(task_genome.parent)
    before = snapshot(task_genome.parent)
    called = llmevo("run", "genome.yaml", "--dry-run", "--trials", "30", "--set", "search.seed=5")
    assert called.code == 0, called.err
    assert snapshot(task_genome.parent) == before
    for said in ("merge_method", "[0, 1.5]", "parent:german", "uniform", "30 trials", "seed 5", "#5 cma"):
        assert said in called.out
    assert "unknown (nothing of these models and tasks was measured" in called.out
    assert max(map(len, called.out.splitlines())) < 200


def test_a_dry_run_as_json_has_the_space_and_the_first_points(llmevo: Any, task_genome: Path) -> None:
    called = llmevo("run", task_genome, "--dry-run", "--json", "--run-dir", task_genome.parent / "run")
    data = json.loads(called.out)
    assert data["space"]["merge_method"]["choices"] == ["task_arithmetic", "ties"]
    assert data["references"][0] == "baseline"
    assert len(data["proposals"]) == 6
    assert set(data["proposals"][0]["params"]) == set(data["space"])
    assert data["seconds"] is None


def test_a_dry_run_estimates_from_what_was_measured(llmevo: Any, task_genome: Path) -> None:
    genome = genomes.load(task_genome)
    folder = task_genome.parent / "runs"
    executor = FunctionExecutor()
    runner.run(
        genome, task_genome.read_text(), folder / "first", observer=PlainDisplay(io.StringIO()),
        executor=executor, limit=10,
    )  # fmt: skip
    called = llmevo("run", task_genome, "--dry-run", "--json", "--run-dir", folder / "second")
    data = json.loads(called.out)
    assert data["rungs"] == "none, every trial answers all 80 items"
    few = llmevo(
        "run", task_genome, "--dry-run", "--set", "search.halving.first=20", "--run-dir", folder / "x"
    )
    assert "from 20 items on, 2 times as many for one trial in 2" in few.out  # another workload: not measured
    assert "a trial, the mean of 10 in" in data["estimate_from"]
    assert data["seconds"] == pytest.approx(24 * 0.5, rel=0.2)
    again = json.loads(llmevo("run", task_genome, "--dry-run", "--json", "--run-dir", folder / "first").out)
    assert again["seconds"] == pytest.approx(14 * 0.5, rel=0.2)


@pytest.mark.parametrize(
    ("proposer", "said"), [("llm", "when the run begins"), ("hybrid", "after 10 trials")]
)
def test_a_dry_run_asks_no_language_model(llmevo: Any, task_genome: Path, proposer: str, said: str) -> None:
    called = llmevo("run", task_genome, "--dry-run", "--proposer", proposer)
    assert called.code == 0, called.err
    assert said in called.out


@pytest.mark.slow
def test_benchmarks_are_refused_unless_allowed(llmevo: Any, task_genome: Path) -> None:
    data = yaml.safe_load(task_genome.read_text())
    data["tasks"] = [{"name": "arc_easy"}]
    task_genome.write_text(yaml.safe_dump(data))
    called = llmevo("run", task_genome, "--dry-run")
    assert called.code == 2
    assert "--allow-benchmark-tasks" in one_line(called)
    assert llmevo("run", task_genome, "--dry-run", "--allow-benchmark-tasks").code == 0


@pytest.mark.parametrize("path", sorted((_ROOT / "genomes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_genomes_that_ship_are_valid(llmevo: Any, path: Path) -> None:
    called = llmevo("validate", path, "--offline", "--json")
    assert called.code == 0, called.err
    data = json.loads(called.out)
    assert data["valid"] is True
    assert data["genes"] > 1


def test_validate_names_a_missing_parent(llmevo: Any, task_genome: Path) -> None:
    data = yaml.safe_load(task_genome.read_text())
    data["genome"]["base_model"] = str(task_genome.parent / "gone")
    task_genome.write_text(yaml.safe_dump(data))
    called = llmevo("validate", task_genome)
    assert called.code == 2
    assert "gone" in one_line(called)


def test_status_and_its_json(llmevo: Any, run_dir: Path) -> None:
    called = llmevo("status", run_dir)
    assert called.code == 0
    assert "22 ok, 2 failed of 24" in called.out
    data = json.loads(llmevo("status", run_dir, "--json").out)
    assert data["trials"] == {"pending": 0, "complete": 22, "failed": 2}
    assert sum(data["origins"].values()) == 24
    assert [row["label"] for row in data["held_out"]][-3:] == ["evolved", "evolved:2", "evolved:3"]
    assert data["held_out_items"] == 400


def test_show_and_its_json(llmevo: Any, run_dir: Path) -> None:
    with Store.open(run_dir, readonly=True) as store:
        trials = store.trials()
    for number in (0, 1, 6, 8):
        called = llmevo("show", run_dir, number)
        assert called.code == 0
        assert trials[number].origin in called.out
        data = json.loads(llmevo("show", run_dir, number, "--json").out)
        recipe = data.pop("recipe")
        assert data == trials[number].to_json()
        assert recipe["merge_method"] in ("passthrough", "task_arithmetic", "ties")
    assert "gave NaN" in llmevo("show", run_dir, 8).out


def test_best_prints_the_recipe_that_the_run_wrote(llmevo: Any, run_dir: Path) -> None:
    called = llmevo("best", run_dir)
    assert called.code == 0
    assert yaml.safe_load(called.out) == yaml.safe_load((run_dir / "best" / "recipe.yaml").read_text())
    assert called.err.startswith("# trial ")
    data = json.loads(llmevo("best", run_dir, "--json").out)
    assert data["recipe"] == yaml.safe_load(called.out)
    assert data["verdict"]


def test_report_writes_one_file_and_its_json(llmevo: Any, run_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    called = llmevo("report", run_dir)
    assert called.out == f"{run_dir / 'report.html'}\n"
    data = json.loads(llmevo("report", run_dir, "--out", tmp_path / "r.html", "--json").out)
    assert Path(data["report"]).read_text().startswith("<!doctype html>")
    assert data["headline"] in Path(data["report"]).read_text()


def play(observer: Any, folder: Path) -> None:
    data = genome_data(trials=12)
    text = yaml.safe_dump(data)
    runner.run(genomes.parse(text), text, folder, observer=observer, executor=FunctionExecutor())


def test_plain_lines_say_each_trial(tmp_path: Path) -> None:
    stream = io.StringIO()
    play(PlainDisplay(stream), tmp_path / "run")
    lines = stream.getvalue().splitlines()
    assert sum(line.startswith("trial ") for line in lines) == 12
    assert any("failed: merge:" in line for line in lines)
    assert "\x1b" not in stream.getvalue()
    assert lines[-1].endswith("all 12 trials are done")


def test_json_lines_are_events(tmp_path: Path) -> None:
    stream = io.StringIO()
    play(JsonDisplay(stream), tmp_path / "run")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert events[0]["event"] == "started"
    assert events[-1]["event"] == "ended"
    assert [e["trial"]["number"] for e in events if e["event"] == "finished"] == list(range(12))


def test_the_live_table_fits_and_ends_clean(tmp_path: Path) -> None:
    stream = io.StringIO()
    display = RichDisplay(Console(file=stream, force_terminal=True, width=90, height=30, color_system=None))
    seen: list[str] = []
    finish = display.finished

    class Watcher:
        started, note, asked, ended = display.started, display.note, display.asked, display.ended
        sifted = display.sifted

        def finished(self, trial: Any, best: Any) -> None:
            finish(trial, best)
            view = Console(file=io.StringIO(), width=90)
            with view.capture() as capture:
                view.print(display._view())
            seen.append(capture.get())

    play(Watcher(), tmp_path / "run")
    assert len(seen) == 12
    for view in seen:
        lines = view.splitlines()
        assert len(lines) <= 3 + 12
        assert max(map(len, lines)) <= 90
    assert "best" in seen[-1]
    assert "12/12" in seen[-1]
    assert display._live is None


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=90, color_system="truecolor")
    play(RichDisplay(console), tmp_path / "run")
    # Bold, dim and cursor movements may stay; colours may not.
    assert not re.search(r"\x1b\[(?:\d+;)*(?:3[0-7]|38;|9[0-7])", stream.getvalue())


def test_auto_is_plain_without_a_terminal() -> None:
    assert isinstance(choose("auto", io.StringIO()), PlainDisplay)
    assert isinstance(choose("rich", io.StringIO()), RichDisplay)


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0.0, 0.25, 1.0]) == "▁▃█"
    assert len(sparkline(list(range(100)), 40)) == 40


@pytest.mark.slow
def test_a_real_run_is_interrupted_continued_and_exported(tiny_llamas: Any, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    write_choice_task(tmp_path / "tasks", "sums", {"test": sums(range(24))})
    genome = {
        "genome": {"models": [str(p) for p in tiny_llamas.parents], "base_model": str(tiny_llamas.base)},
        "tasks": [{"name": "sums", "metric": "gold_logprob,none"}],
        "search": {"trials": 40, "proposer": "cma"},
        "evaluate": {"task_path": [str(tmp_path / "tasks")], "device": "cpu", "dtype": "float32"},
    }
    (tmp_path / "genome.yaml").write_text(yaml.safe_dump(genome))
    command = [str(Path(sys.executable).with_name("llmevo")), "run", "genome.yaml", "--display", "json"]
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr)
        try:
            deadline = time.monotonic() + 180
            while (tmp_path / "stderr").read_text().count('"finished"') < 8:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert b"the same command goes on from here" in out
    shown = json.loads(_run("status", "runs/genome", "--json", folder=tmp_path).stdout)
    assert 8 <= shown["trials"]["complete"] < 40
    assert shown["resumable"] is True

    ended = _run("run", "genome.yaml", "--json", folder=tmp_path)
    data = json.loads(ended.stdout)
    assert data["trials"]["complete"] == 40
    assert [row["label"] for row in data["held_out"]][-3:] == ["evolved", "evolved:2", "evolved:3"]
    assert "continuing after" in ended.stderr
    assert "Traceback" not in ended.stderr

    assert "valid" in _run("validate", "genome.yaml", folder=tmp_path).stdout
    exported = json.loads(_run("export", "runs/genome", "--out", "merged", "--json", folder=tmp_path).stdout)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(exported["files"])
    assert "held-out items" in (tmp_path / "merged" / "README.md").read_text()

    other = subprocess.run(
        [*command, "--seed", "9"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert "search.seed: 0 -> 9" in other.stderr
    assert "--fresh" in other.stderr


def _run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).with_name("llmevo"))
    done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done
