"""`llmevo bench adapters`: every method on the same tokens, counted and scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from llmevo.cli import main  # noqa: E402
from llmevo.errors import GenomeError  # noqa: E402
from llmevo.train import comparison, memory  # noqa: E402


@pytest.mark.slow
@pytest.mark.usefixtures("untouched")
def test_methods_are_trained_on_the_same_tokens_and_scored_on_the_same_examples(
    tiny: Any, tokenizer: Any, facts_file: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    data, methods = {"train": str(facts_file)}, ("lora", "deltalora", "ia3")
    found = comparison.compare(tiny, tokenizer, data, methods, tokens=1500, seeds=2, note=lines.append)
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == [line.split(":")[0] for line in lines] == list(methods)
    for row in rows.values():
        assert len(row["losses"]) == 2
        assert row["loss"] == pytest.approx(sum(row["losses"]) / 2)
        assert row["gain"] == pytest.approx(found["untrained"] - row["loss"])
        assert row["gain"] > 0
        assert 0 < row["gain_stderr"] < row["stderr"]  # pairs
        assert row["seconds"] > 0
    assert rows["ia3"]["rank"] is None
    assert rows["ia3"]["learning_rate"] == 5e-3
    assert rows["ia3"]["trained"] < 0.1 * rows["lora"]["trained"] == 0.1 * rows["deltalora"]["trained"]
    # Delta-LoRA goes further on the same gradients.
    assert rows["deltalora"]["gain"] > rows["lora"]["gain"]
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(GenomeError, match=r"`--methods` must name some of lora, .* but got 'lore'"):
        comparison.compare(tiny, tokenizer, data, ["lore"], tokens=100)
    with pytest.raises(GenomeError, match=r"`--tokens` must be >= 439, .* but may be 100"):
        comparison.compare(tiny, tokenizer, data, ["ia3"], tokens=100)
    with pytest.raises(GenomeError, match=r"`--tokens` must be enough for 3 steps, .* got 500, which are"):
        comparison.compare(tiny, tokenizer, data, ["ia3"], tokens=500)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(facts_file.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(GenomeError, match=r"`train.data` must have >= 16 training examples, a step.s, but"):
        comparison.compare(tiny, tokenizer, {"train": str(few)}, ["ia3"], tokens=500)


def test_the_peak_is_that_of_the_block() -> None:
    device = torch.device("cpu")
    with memory.peak(device) as first:
        held = torch.ones(48 << 18)  # 48 MiB
        del held
    with memory.peak(device) as second:
        pass
    assert memory.source(device) == memory.RSS
    if first.bytes is None or second.bytes is None:
        pytest.skip("this system does not count a process's memory")
    assert 47 << 20 < first.bytes < 80 << 20
    assert second.bytes < 8 << 20


def test_the_default_data_has_no_meaning_in_both_parts() -> None:
    pytest.importorskip("babel")
    with comparison.words() as files:
        learnt, held_out = (
            [json.loads(line) for line in Path(files[part]).read_text().splitlines()]
            for part in ("train", "validation")
        )
    assert (len(learnt), len(held_out)) == (600, 300)
    assert len({row["completion"] for row in learnt}) > 20
    assert not {row["prompt"] for row in learnt} & {row["prompt"] for row in held_out}
    assert not Path(files["train"]).exists()


@pytest.mark.slow
def test_the_command_prints_a_line_for_each_method(
    tiny_folder: Path, facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = [name for name in comparison.METHODS if name != "adalora"]  # it would begin with rank 48 of 32
    with pytest.raises(SystemExit, match=r"^0$"):
        main(
            [
                *("bench", "adapters", "--model", str(tiny_folder), "--data", str(facts_file)),
                *(
                    "--methods",
                    ",".join(methods),
                    "--tokens",
                    "1200",
                    "--dtype",
                    "float32",
                    "--out",
                    str(tmp_path / "found.json"),
                ),
            ]
        )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(methods)]] == methods
    assert len(json.loads((tmp_path / "found.json").read_text())["rows"]) == len(methods) == 10


def test_a_model_that_does_not_go_on_with_a_text_is_told_in_a_line(
    facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "adapters", "--model", str(tmp_path), "--data", str(facts_file)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "`--model` must be a model that goes on with a text" in said
    assert "T5Config" in said
    assert "LlamaConfig" not in said  # transformers names every kind that there is
