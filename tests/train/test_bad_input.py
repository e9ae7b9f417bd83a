"""What a user can get wrong about a training: one line says what to do, before the first step.

Through the real command. Its workers are in this process, since a process for each case would take minutes;
one slow case has a real one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("lm_eval")

from test_run import InProcess, command

from llmevo.runner import workers
from llmevo.store import Store

ROWS = [
    {"prompt": f"The capital of land{i}" + " far" * (i % 4) + " is", "completion": f" c{i}"}
    for i in range(40)
]
FILES: dict[str, Iterable[Any] | str] = {
    "good.jsonl": ROWS,
    "broken.jsonl": [*ROWS[:3], '{"prompt": "a'],
    "list.jsonl": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=1),
    "text.jsonl": "one\ntwo\n",
    "latin.jsonl": b'{"text": "\xe9t\xe9"}\n'.decode("latin-1"),
    "columns.jsonl": [{"question": "a", "answer": "b"}],
    "half.jsonl": [{"prompt": "a"}],
    "number.jsonl": [{"prompt": "a", "completion": 3}],
    "empty-answer.jsonl": [{"prompt": "a", "completion": ""}],
    "empty-text.jsonl": [{"text": ""}],
    "mixed.jsonl": [*ROWS, {"text": "a b"}],
    "chat.jsonl": [{"messages": [{"role": "user", "content": "hi"}]}],
    "no-chat.jsonl": [{"messages": "hi"}],
    "none.jsonl": [],
    "two.jsonl": ROWS[:2],
    "long.jsonl": [{"prompt": "far " * 200, "completion": " x"}, *ROWS],
    "texts.jsonl": [{"text": "one two three"}] * 40,
    "bad.parquet": "PAR1 no",
}


@dataclass(frozen=True)
class Bad:
    """What is wrong, and what must be said.

    Args:
        says: A pattern that the line has.
        train: Settings of `train`; `data` and files in it are names in `FILES`.
        more: Other sections.
        parsed: Whether the file alone shows it, so that not even a directory is made.
    """

    says: str
    train: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    parsed: bool = False


def settings(says: str, more: dict[str, Any] | None = None, **train: Any) -> Bad:
    return Bad(says, train, more or {})


def parsed(says: str, more: dict[str, Any] | None = None, **train: Any) -> Bad:
    return Bad(says, train, more or {}, parsed=True)


CASES = {
    # the data
    "a bad line": settings(
        r"`train.data`: .*broken.jsonl, line 4: each line must be a JSON object, but this one is not "
        r'\(Unterminated string.*\): \{"prompt": "a; write each row as one object in a line of its own',
        data="broken.jsonl",
    ),
    "a list": settings(r"line 1: an example must have .* this is the list \[.*; write", data="list.jsonl"),
    "JSON over many lines": settings(r"each line must be a JSON object, .*: \[; write", data="indented.json"),
    "a text": settings(r"line 1: each line must be a JSON object, .*: one; write", data="text.jsonl"),
    "another encoding": settings(
        r"latin.jsonl must be JSON lines in UTF-8, .*; write it", data="latin.jsonl"
    ),
    "other columns": settings(
        r"line 1: an example must have `text`, `prompt` and `completion`, or `messages`, but it has only "
        r"answer, question; rename the columns, or say in `train.data.columns` which is which",
        data="columns.jsonl",
    ),
    "a column that is not there": settings(
        r"`train.data.columns` takes 'prompt' from 'q', which is not there; name some of completion, prompt",
        data={"train": "good.jsonl", "columns": {"prompt": "q"}},
    ),
    "no answer": settings(r"`completion` must be a text .* the row has none; fill", data="half.jsonl"),
    "a number as answer": settings(r"`completion` must be a text .*, but got 3; fill", data="number.jsonl"),
    "an empty answer": settings(
        r"`completion` must be a text .* but got ''; fill", data="empty-answer.jsonl"
    ),
    "an empty text": settings(r"line 1: `text` must be a text that is not empty", data="empty-text.jsonl"),
    "rows of two kinds": settings(
        r"all rows of .*mixed.jsonl must be of one kind, but there are rows with prompt and with text; write",
        data="mixed.jsonl",
    ),
    "a chat without an answer": settings(
        r"`messages` must hold an assistant's turn .* \['user'\]; add the answer", data="chat.jsonl"
    ),
    "a chat that is none": settings(r"`messages` must be a list of `role`.*; mend it", data="no-chat.jsonl"),
    "a damaged parquet file": settings(r"bad.parquet must be a parquet file, .*; write", data="bad.parquet"),
    "a file that is not there": settings(
        r"`train.data` must name files, but '.*nowhere.jsonl' is not one; check the path",
        data="nowhere.jsonl",
    ),
    "a data set that is not there": settings(
        r"`train.data` must name a file, or what `datasets` reads as NAME or NAME\[split\], but "
        r"'nobody/has-this' is neither \(.*\); check the path, the name and the split",
        data="nobody/has-this",
    ),
    "an empty file": settings(r"`train.data` must have rows, but .* has none; add", data="none.jsonl"),
    "an empty split": settings(
        r"`train.data` must have rows, but .*none.jsonl has none",
        data={"train": "good.jsonl", "test": "none.jsonl"},
    ),
    "too few rows for three splits": settings(
        r"`train.data.train` must hold enough examples for all parts, but .* has 2; add", data="two.jsonl"
    ),
    "a share above one": parsed(
        r"`train.data.validation` must be a file, or a share > 0 and < 1, but got 1.5; change it",
        data={"train": "good.jsonl", "validation": 1.5},
    ),
    "too long an example": settings(
        r"long.jsonl, line 1: an example must have <= 256 tokens, but it has \d+, and 1 of .*; shorten them, "
        r"raise `train.data.max_length` .* or set `train.data.too_long` to drop or cut",
        data={"train": "good.jsonl", "test": "long.jsonl"},
    ),
    "a length above the context": settings(
        r"`train.data.max_length` must be <= 256, the model's context, but got 1000; lower it",
        data={"train": "good.jsonl", "max_length": 1000},
    ),
    "all examples too long": settings(
        r"must give the train part at least one example, but with at most 3 tokens all 32 were dropped",
        data={"train": "good.jsonl", "max_length": 3, "too_long": "drop"},
    ),
    "nothing to learn in any example": settings(
        r"with at most 4 tokens all 32 were cut off before their first token to learn; raise",
        data={"train": "good.jsonl", "max_length": 4, "too_long": "cut"},
    ),
    "labels that are not there": settings(
        r"with the head classification an example must have `text` and `label`, but it has only completion",
        head="classification",
    ),
    "a metric without answers": settings(
        r"`tasks` names rouge1, for which every example must have something to answer; give `prompt`",
        {"tasks": ["rouge1"]},
        data="texts.jsonl",
    ),
    "a loss without examples": parsed(
        r"`tasks` names general_loss, which needs `train.data.general`; add it",
        {"tasks": ["validation_loss", "general_loss"]},
    ),
    # the model
    "modules that are not there": settings(
        r"`train.target_modules` must match linear modules .* but 'qkv' matches none; name some of down",
        target_modules=["q_proj", "qkv"],
    ),
    "a rank above the layer": settings(
        r"`train.rank` must be <= 32, the smaller side of `model.*k_proj` \[64, 32\], but may be 64; lower",
        rank={"choice": [4, 64]},
    ),
    "a rank above AdaLoRA's": settings(
        r"`train.rank` must be <= 21, two thirds of .* \(adalora begins .* but may be 22; lower",
        rank=22,
        adapter="adalora",
    ),
    "a rank above SHiRA's": settings(
        r"`train.rank` must be <= 21, the elements over the sum of the sides of .* but may be 32; lower",
        rank=32,
        adapter="shira",
    ),
    "blocks that do not divide": settings(
        r"`train.rank`, with oft the side of its blocks, must divide the 64 .* may be 7; give a divisor",
        rank=7,
        adapter="oft",
    ),
    "more layers than there are": settings(
        r"`train.layers` must be <= 4, the model's layers, but may be 5; lower it", layers={"int": [1, 5]}
    ),
    "a model that is not there": Bad(
        r"`genome.models` must name folders or models on .* hub, but there is no folder '/nowhere'; check",
        more={"genome": {"models": ["/nowhere"]}},
    ),
    # the hyperparameters
    "a batch above the data": settings(
        r"`train.batch_size` must be <= the number of training examples, 32, but may be 33; lower it",
        batch_size={"int": [8, 33]},
    ),
    "a budget below one batch": settings(
        r"`train.tokens` must be >= \d+, the tokens of a first batch of 8 examples, but may be 20; raise it, "
        r"or lower `train.batch_size`",
        tokens={"int": [20, 2000]},
    ),
    "epochs below one batch": settings(
        r"`train.epochs` must give >= \d+, the tokens .* may be 0.1, which gives \d+; raise",
        epochs=0.1,
    ),
    "rungs without room": settings(
        r"`search.halving.enabled` must not be true here: .* ends before the first step of \d+; raise",
        {"search": {"trials": 9, "population": 6, "halving": {"enabled": True}}},
        tokens=400,
    ),
    "a method that is not there": parsed(r"`adapter` must be one of lora, .* got 'lorra'", adapter="lorra"),
    "a gene with a bad choice": parsed(r"`adapter` must be one .* 'no'", adapter={"choice": ["lora", "no"]}),
    "a method that is refused": parsed(r"`adapter` must not be p_tuning: it adds tokens", adapter="p_tuning"),
    "a rate below zero": parsed(
        r"`learning_rate` must be a number > 0 and <= 10, but got -0.1; change it",
        learning_rate={"float": [-0.1, 0.1]},
    ),
    "a rank of zero": parsed(r"`rank` must be a whole number >= 1, but got 0", rank={"int": [0, 8]}),
    "a dropout of one": parsed(r"`dropout` must be .* < 1, but got 1.0", dropout={"float": [0, 1]}),
    "parts of no example": parsed(r"`accumulation` must be <= `batch_size`, .* 9 and 8", accumulation=9),
    "no pass": parsed(r"`epochs` must be a number > 0, or null, but got 0", epochs=0),
    "two lengths": parsed(r"`epochs` and `tokens` exclude each other; remove one", epochs=1, tokens=900),
    "a misspelt key": parsed(r"`train.learning_rat` is not a key; did you mean", learning_rat=1),
    "a misspelt task": parsed(
        r"`tasks` names 'validation_los', which is no task; did you mean validation_loss\?",
        {"tasks": ["validation_los"]},
    ),
    "no finalist": parsed(
        r"`evaluate.finalists` must be greater than or equal to 1", {"evaluate": {"finalists": 0}}
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        if not isinstance(content, str):
            content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content)
        (folder / name).write_text(content, encoding="latin-1")
    return folder


@pytest.fixture(scope="module")
def write(folder: Path, tiny_folder: Path) -> Callable[[Path, Bad], Path]:
    """Writes the genome of a case."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(one) for key, one in value.items()}
        return str(folder / value) if str(value).endswith((".jsonl", ".json", ".parquet")) else value

    def write(where: Path, case: Bad) -> Path:
        train = {"data": "good.jsonl", "rank": 4, "batch_size": 8, "learning_rate": {"float": [1e-3, 1e-2]}}
        sections: dict[str, Any] = {
            "genome": {"models": [str(tiny_folder)], "dtype": "float32"},
            "tasks": ["validation_loss"],
            "search": {"trials": 4, "population": 2, "proposer": "random"},
            "evaluate": {"device": "cpu", "dtype": "float32", "finalists": 1, "reruns": 0},
            "train": {**train, **case.train},
            **case.more,
        }
        sections["train"]["data"] = named(sections["train"]["data"])
        path = where / "genome.yaml"
        path.write_text(yaml.safe_dump(sections))
        return path

    return write


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers in this process, without their bar of the weights that are loaded, which has its own file."""
    from transformers.utils import logging

    logging.disable_progress_bar()

    def make(genome: Any, count: int, timeout: Any, log: Path) -> InProcess:
        return Late(lambda: InProcess(genome, log.parent))

    monkeypatch.setattr(workers, "LocalExecutor", make)
    yield
    logging.enable_progress_bar()


class Late:
    """An executor that, as the real one, says in `describe` what went wrong while it was made."""

    workers = 1

    def __init__(self, make: Callable[[], InProcess]) -> None:
        self._make = make

    def describe(self) -> dict[str, Any]:
        self._made = self._make()
        return self._made.describe()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)

    def shutdown(self, cancel: bool = False) -> None:
        """There is nothing to end."""


def assert_one_line(said: str, case: Bad) -> None:
    lines = said.splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("error: ")
    assert re.search(case.says, lines[0]), lines[0]
    assert "`" in lines[0]
    assert "Traceback" not in said


def trials_in(run_dir: Path) -> int:
    with Store.open(run_dir, readonly=True) as store:
        return len(store.trials())


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("verb", ["run", "validate"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_line_says_what_to_do_before_the_first_step(
    case: Bad,
    verb: str,
    write: Callable[[Path, Bad], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, run_dir = write(tmp_path, case), tmp_path / "run"
    options = ["--run-dir", str(run_dir), "--display", "none"] if verb == "run" else []
    assert command(verb, str(path), *options) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert_one_line(output.err, case)
    if case.parsed or verb == "validate":
        assert not run_dir.exists()
        return
    assert trials_in(run_dir) == 0
    assert not (run_dir / "adapters").exists()


@pytest.mark.usefixtures("here")
def test_the_corrected_genome_runs_in_the_same_directory(
    write: Callable[[Path, Bad], Path], tmp_path: Path
) -> None:
    case, run_dir = CASES["a rank above the layer"], tmp_path / "run"
    where = ("--run-dir", str(run_dir), "--display", "none")
    assert command("run", str(write(tmp_path, case)), *where) == 2
    assert command("run", str(write(tmp_path, Bad(""))), *where) == 0
    assert trials_in(run_dir) == 4


@pytest.mark.slow
def test_a_worker_of_its_own_says_the_same(write: Callable[[Path, Bad], Path], tmp_path: Path) -> None:
    case = CASES["a rank above the layer"]
    program = "from llmevo.cli import main; main()"
    given = ["run", str(write(tmp_path, case)), "--run-dir", str(tmp_path / "run"), "--display", "none"]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program, *given], capture_output=True, text=True, env=one)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, case)
    assert trials_in(tmp_path / "run") == 0
