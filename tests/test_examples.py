"""The examples run as their first lines say, and say something true."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """Import an example by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def run(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, cwd=ROOT
    )


def single_word(word: str) -> bool:
    return " " not in word


def test_ask_tell_finds_the_valley(example) -> None:
    best = example("ask_tell").main("cma")
    assert best.params["optimizer"] in ("adamw", "sgd")
    rate = best.params["lr"] * (0.1 if best.params["optimizer"] == "sgd" else 1.0)
    assert 3e-5 < rate < 3e-3
    assert best.value < 0.85


def test_ask_tell_needs_no_torch() -> None:
    code = "import sys, ask_tell; ask_tell.main('ga'); assert 'torch' not in sys.modules; print('lean')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=EXAMPLES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("lean\n")


def test_the_custom_proposer_beats_random(example) -> None:
    found = example("custom_proposer").main()
    assert found["one_plus_one"] < found["random"] / 3
    assert found["cma"] < found["random"] / 3


def test_the_custom_proposer_depends_on_history_alone(example) -> None:
    import numpy as np

    import llmevo

    module = example("custom_proposer")
    space = llmevo.Space({"x": llmevo.Float(0.0, 1.0), "y": llmevo.Float(0.0, 1.0)})
    search = llmevo.Optimizer(
        space, proposer=module.OnePlusOne(space, "maximize"), direction="maximize", seed=3
    )
    for _ in range(12):
        (trial,) = search.ask(1)
        if trial.number == 5:
            search.tell(trial, error="out of memory")
        else:
            search.tell(trial, -abs(trial.params["x"] - 0.7))
    again = module.OnePlusOne(space, "maximize").propose(1, search.trials, np.random.default_rng([3, 12]))
    assert [p.params for p in again] == [t.params for t in search.ask(1)]


@pytest.mark.parametrize("subject", ["cities", "states", "languages", "scripts"])
def test_quickstart_facts_are_split_by_topic(example, subject: str) -> None:
    data = example("quickstart_data")
    facts = data.SUBJECTS[subject](single_word)
    train, asked = data.split(facts, 0, 1000, 640)
    assert (len(train), len(asked)) == (1000, 640)
    assert not {fact.topic for fact in train} & {fact.topic for fact in asked}
    assert not {fact.prompt for fact in train} & {fact.prompt for fact in asked}
    assert data.split(facts, 0, 1000, 640) == (train, asked)
    assert all(fact.answer in fact.rivals for fact in facts)


def test_quickstart_tasks_have_four_choices_and_no_favourite(example, tmp_path: Path) -> None:
    data = example("quickstart_data")
    _, asked = data.split(data.states(single_word), 0, 100, 600)
    data.write_tasks(tmp_path, {"states": asked}, 0)
    rows = [json.loads(line) for line in (tmp_path / "states.jsonl").read_text().splitlines()]
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert [row["choices"][row["gold"]] for row in rows] == [fact.answer for fact in asked]
    shares = [sum(row["gold"] == place for row in rows) / len(rows) for place in range(4)]
    assert all(0.18 < share < 0.32 for share in shares)


@pytest.mark.slow
def test_merge_two_evolves_a_merge(tmp_path: Path) -> None:
    done = run("examples/merge_two.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    shown = dict(line.split()[:2] for line in done.stdout.splitlines() if not line.startswith("mergekit"))
    assert float(shown["evolved"]) >= float(shown["uniform"])
    assert (tmp_path / "best.yaml").is_file()


def test_lora_search_data_have_no_topic_in_two_parts(
    example, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = example("lora_search")

    class Words:
        """A tokenizer that takes a word for a token."""

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [0] * len(text.split())

    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_: Words())
    parts = module.examples(tmp_path, module.FULL)
    assert {part: len(facts) for part, facts in parts.items()} == module.FULL
    topics = [{fact.topic for fact in facts} for facts in parts.values()]
    assert not topics[0] & topics[1]
    assert not topics[0] & topics[2]
    assert not topics[1] & topics[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_lora_search_finds_settings_and_leaves_an_adapter(tmp_path: Path, smollm2: Path) -> None:
    from peft import PeftConfig
    from safetensors.torch import load_file

    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "smollm2").symlink_to(smollm2)
    done = run("examples/lora_search.py", "--smoke", "--folder", str(tmp_path), timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the default settings" in " ".join(done.stdout.split())
    assert "SFTConfig(" in done.stdout
    assert "\nlora_r: " in done.stdout
    best = tmp_path / "runs/lora-smollm2/best"
    assert PeftConfig.from_pretrained(best / "adapter").base_model_name_or_path == ".cache/smollm2"
    merged = load_file(best / "merged" / "model.safetensors")
    assert merged.keys() == load_file(smollm2 / "model.safetensors").keys()


def test_eln_corpora_share_no_document_and_no_passage(example) -> None:
    pytest.importorskip("sklearn")
    module = example("eln")
    for documents, names in zip(
        module.corpora(), (("train", "validation", "test"), ("general", "general_test")), strict=True
    ):
        parts = module.split(documents, [module.FULL[name] for name in names])
        assert [len(part) for part in parts] == [module.FULL[name] for name in names]
        owner = {passage: number for number, document in enumerate(documents) for passage in document}
        assert len(owner) == sum(map(len, documents))
        used = [{owner[passage] for passage in part} for part in parts]
        assert len(set.union(*used)) == sum(map(len, used))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_eln_holds_a_single_training_and_random_search_against_the_population(
    tmp_path: Path, tiny_llamas: Any
) -> None:
    """With a tiny model in SmolLM2's place: what is shown is that the three runs fit together."""
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "smollm2").symlink_to(tiny_llamas.base)
    done = run("examples/eln.py", "--smoke", "--folder", str(tmp_path), timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "runs" / "eln" / "report.html").read_text()
    assert all(name in text for name in ("Beside other runs", "eln-random", "eln-single"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quickstart_runs_to_the_end_and_keeps_its_experts(
    example, tmp_path: Path, smollm2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "smollm2").symlink_to(smollm2)
    done = run("examples/quickstart.py", "--smoke", "--folder", str(tmp_path), timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "evolved" in done.stdout
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob(".cache/quickstart/experts/*/made_from.json")}
    assert len(stamps) == 4
    module = example("quickstart")
    module.prepare(tmp_path / ".cache", module.SMOKE)  # what a second run begins with
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert capsys.readouterr().err.count("expert is there already") == 4


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compare_adapters_draws_both_models(example, tmp_path: Path) -> None:
    done = run("examples/compare_adapters.py", "--smoke", "--folder", str(tmp_path), timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["model", "adapter", "lr", "loss", "ROUGE-L", "BLEU"]
    assert {tuple(line.split()[:2]) for line in lines} >= {(m, "none") for m in ("GPT-2", "T5")}
    assert (tmp_path / "runs" / "compare.png").stat().st_size > 10_000
    history = example("compare_adapters").curves(tmp_path / "runs" / "compare-t5")
    assert [epoch["epochs"] for epoch in history["lora"]] == [0, 1, 2]
    assert history["lora"][2]["validation_loss"] < history["no adapter"][2]["validation_loss"]


def test_dates_to_compare_on_have_no_date_in_two_parts(example) -> None:
    module = example("compare_adapters")
    rows = module.rows(module.NEW, 720, 1)
    assert len({row["prompt"].split()[1] for row in rows}) == 720
    assert {"prompt": "it 2024-03-05 2:", "completion": " martedì 5 marzo 2024"} in module.rows(
        ["it"], 40 * 365, 0
    )
