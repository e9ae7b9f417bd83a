"""Examples: what is learnt of them, how they are split and packed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmevo.errors import GenomeError
from llmevo.genome.train import DataSpec
from llmevo.train.data import Example, lay_out, load, pack
from llmevo.train.rows import read


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def one(path: Path, row: dict[str, Any], tokenizer: Any) -> Example:
    """The example that a row becomes."""
    file = write(path, [row])
    return load(DataSpec(train=file, validation=file, test=file), tokenizer, 256, 0).parts["train"][0]


def learnt(example: Example, tokenizer: Any) -> str:
    return tokenizer.decode(example.tokens[example.targets])


def test_of_a_completion_its_tokens_and_the_end_are_learnt(tmp_path: Path, tokenizer: Any) -> None:
    example = one(tmp_path / "a.jsonl", {"prompt": "1 + 1 is", "completion": " two"}, tokenizer)
    assert tokenizer.decode(example.tokens) == "1 + 1 is two<|im_end|>"
    assert learnt(example, tokenizer) == " two<|im_end|>"


def test_of_a_text_all_but_the_first_token_is_learnt(tmp_path: Path, tokenizer: Any) -> None:
    example = one(tmp_path / "a.jsonl", {"text": "Paris is in France."}, tokenizer)
    assert example.targets.tolist() == [False] + [True] * (len(example) - 1)
    assert tokenizer.decode(example.tokens) == "Paris is in France.<|im_end|>"


def test_a_token_across_the_border_belongs_to_the_completion(tmp_path: Path, tokenizer: Any) -> None:
    # "Par" + "is" are one token together.
    joint = tokenizer("is Paris").input_ids
    assert joint[: len(tokenizer("is Par").input_ids)] != tokenizer("is Par").input_ids
    example = one(tmp_path / "a.jsonl", {"prompt": "is Par", "completion": "is"}, tokenizer)
    assert example.tokens.tolist() == [*joint, tokenizer.eos_token_id]
    assert "Paris" in learnt(example, tokenizer)
    assert not learnt(example, tokenizer).startswith("is ")


def test_of_a_chat_the_assistants_turns_are_learnt(tmp_path: Path, tokenizer: Any) -> None:
    turns = ["Hi", "Hello!", "1 + 1?", "2."]
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
    example = one(tmp_path / "a.jsonl", {"messages": messages}, tokenizer)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.tokens) == whole
    assert learnt(example, tokenizer) == "Hello!<|im_end|>\n2.<|im_end|>\n"


def test_shares_split_the_file_and_nothing_is_lost(facts_file: Path, tokenizer: Any) -> None:
    spec = DataSpec(train=str(facts_file), validation=0.2, test=0.1)
    found = load(spec, tokenizer, 256, 0)
    assert found.describe()["examples"] == {"train": 56, "validation": 16, "test": 8}
    keys = [e.tokens.tobytes() for examples in found.parts.values() for e in examples]
    assert len(set(keys)) == 80
    assert load(spec, tokenizer, 256, 0).describe() == found.describe()
    assert load(spec, tokenizer, 256, 1).describe()["fingerprint"] != found.describe()["fingerprint"]


def test_rows_of_the_training_part_elsewhere_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    train = write(tmp_path / "a.jsonl", [{"text": f"fact {i}"} for i in range(6)])
    test = write(tmp_path / "b.jsonl", [{"text": f"fact {i}"} for i in range(4, 8)])
    found = load(DataSpec(train=train, validation=test, test=test), tokenizer, 256, 0)
    assert found.describe()["repeated"] == {"validation": 2, "test": 2}


def test_parquet_is_read_as_jsonl_is(tmp_path: Path, facts_file: Path, tokenizer: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [json.loads(line) for line in facts_file.read_text().splitlines()]
    path = tmp_path / "facts.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = [load(DataSpec(train=str(p)), tokenizer, 256, 0).describe() for p in (path, facts_file)]
    assert found[0] == found[1]


def test_too_few_rows_for_three_parts(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "one fact"}, {"text": "two facts"}])
    with pytest.raises(GenomeError, match="must hold enough examples for all parts"):
        load(DataSpec(train=file), tokenizer, 256, 0)


def test_long_examples_are_an_error_or_dropped_or_cut(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": "word " * count} for count in (3, 4, 5, 60, 80)]
    file, short = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:1])

    def found(too_long: str, context: int = 100) -> Any:
        spec = DataSpec(train=file, validation=short, test=short, too_long=too_long)
        return load(spec, tokenizer, context, 0)

    length = len(tokenizer("word " * 80).input_ids) + 1
    with pytest.raises(GenomeError, match=rf"line 5: .* <= 100 tokens, but it has {length}, and 2 of 5"):
        found("error")
    dropped = found("drop")
    assert (len(dropped.parts["train"]), dropped.dropped["train"]) == (3, 2)
    cut = found("cut")
    assert (len(cut.parts["train"]), cut.cut["train"]) == (5, 2)
    assert max(map(len, cut.parts["train"])) == 100
    with pytest.raises(GenomeError, match="must give the train part at least one example"):
        found("drop", 2)
    with pytest.raises(GenomeError, match=r"`train.data.max_length` must be <= 100"):
        load(DataSpec(train=file, max_length=200), tokenizer, 100, 0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 60))
def test_packing_loses_nothing_and_keeps_the_capacity(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[index] for index in row) <= capacity or len(row) == 1
    short = [length for length in lengths if length <= capacity]
    assert len(rows) <= 2 * sum(short) / capacity + 1 + len(lengths) - len(short)


@given(st.lists(st.integers(2, 12), min_size=1, max_size=10), st.booleans(), st.randoms())
def test_a_layout_has_each_target_behind_its_context(lengths: list[int], packed: bool, random: Any) -> None:
    start = 1
    examples = []
    for length in lengths:
        targets = np.array([False, *(random.random() < 0.5 for _ in range(length - 2)), True])
        examples.append(Example(np.arange(start, start + length), targets))
        start += length
    batch = lay_out(examples, packed)
    flat = batch.tokens.ravel()
    assert sorted(flat[flat > 0].tolist()) == list(range(1, start))
    # Tokens are numbered on, so the one that predicts a target is the one before it, of the same example.
    assert (flat[batch.sources] + 1 == batch.labels).all()
    for owner, example in enumerate(examples):
        assert batch.labels[batch.owners == owner].tolist() == example.tokens[example.targets].tolist()
        (row, column) = np.argwhere(batch.tokens == example.tokens[0])[0]
        places = batch.positions[row, column : column + len(example)]
        assert places.tolist() == list(range(len(example)))


def pairs_of(part: str, count: int) -> list[dict[str, Any]]:
    return [{"document": f"{part} {i} is", "summary": f" number {i}", "noise": None} for i in range(count)]


@pytest.mark.parametrize("form", ["save_to_disk", "dict_on_disk", "parquet"])
def test_a_data_set_is_read_by_its_splits_and_columns(
    form: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parts = {name: datasets.Dataset.from_list(pairs_of(name, 12)) for name in ("train", "validation")}
    folder = tmp_path / "set"
    if form == "dict_on_disk":
        datasets.DatasetDict(parts).save_to_disk(folder)
    elif form == "save_to_disk":
        parts["train"].save_to_disk(folder)
    else:
        for name, part in parts.items():
            part.to_parquet(folder / f"{name}.parquet")
    data: dict[str, Any] = {"train": str(folder), "columns": {"prompt": "document", "completion": "summary"}}
    if form != "save_to_disk":
        data["validation"] = f"{folder}[validation]"
    found = load(DataSpec(**data), tokenizer, 64, 0)
    counts = {part: len(examples) for part, examples in found.parts.items()}
    assert counts == {
        "train": 10 if form == "save_to_disk" else 11,
        "validation": len(found.parts["validation"]),
        "test": 1,
    }
    texts = {part: [tokenizer.decode(e.text.prompt) for e in found.parts[part]] for part in counts}
    own = "train" if form == "save_to_disk" else "validation"
    assert all(text.startswith(f"{own} ") for text in texts["validation"])
    assert all(text.startswith("train ") for text in texts["train"] + texts["test"])
    with pytest.raises(GenomeError, match=r"takes 'prompt' from 'title', which is not there; name some"):
        load(DataSpec(train=str(folder), columns={"prompt": "title"}), tokenizer, 64, 0)


def test_class_labels_have_their_names_and_unknown_sets_are_told(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(4)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "set")
    found = read(str(tmp_path / "set"), {}, "classification")
    assert [row.content["label"] for row in found] == ["no", "yes", "no", "yes"]
    with pytest.raises(GenomeError, match=r"`train.data` must name a file, or what `datasets` reads"):
        read("nobody/has-this-set[train]", {}, "lm")
    assert len(read(f"{tmp_path / 'set'}[train]", {}, "lm")) == 4
    with pytest.raises(GenomeError, match=r"it has no splits, so no 'validation'"):  # the same rows otherwise
        read(f"{tmp_path / 'set'}[validation]", {}, "lm")


@pytest.mark.parametrize(
    ("line", "head", "says"),
    [
        (
            r'{"text": "a \ud83d b"}',
            "lm",
            r"`text` must be Unicode text, but has half of a surrogate .*\\ud83d",
        ),
        ('{"text": "a", "label": 1%s}' % ("0" * 400), "regression", r"`label` must be a finite number"),
        ('{"text": "a", "more": %s}' % ("[" * 20000), "lm", r"each line must be a JSON object"),
    ],
)
def test_odd_rows_are_told(line: str, head: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(GenomeError, match=says):
        read(write(tmp_path / "a.jsonl", [line]), {}, head)
