"""Models that answer with another text, a class or a number: trained, saved and measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from reference_trainer import of_trainer  # noqa: E402

from llmevo.errors import GenomeError  # noqa: E402
from llmevo.genome.train import TrainSettings  # noqa: E402
from llmevo.train import Trainer, adapters, methods  # noqa: E402
from llmevo.train.data import Example  # noqa: E402
from llmevo.train.loop import Training, plan  # noqa: E402

PAD = 2  # the tokenizer's
KINDS = ("t5", "llama", "gpt2")


def make(kind: str, vocabulary: int, scale: float = 3.0) -> Any:
    """A tiny random model: a T5, or a Llama or GPT-2 that classifies; the same each time."""
    import transformers as hf

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if kind == "t5":
            config = hf.T5Config(
                vocab_size=vocabulary,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_decoder_layers=3,
                num_heads=4,
                pad_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                dropout_rate=0.0,
            )
            model = hf.T5ForConditionalGeneration(config)
        elif kind == "llama":
            shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
            config = hf.LlamaConfig(vocab_size=vocabulary, pad_token_id=None, **shape, **heads)
            model = hf.LlamaForSequenceClassification(config)
        else:
            drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
            config = hf.GPT2Config(vocab_size=vocabulary, bos_token_id=2, eos_token_id=2, **shape, **drop)
            model = hf.GPT2ForSequenceClassification(config)
        for parameter in model.parameters():  # random models are too alike in all they say
            if parameter.dim() > 1:
                parameter.data.mul_(scale)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pairs, texts with a class, and texts with a number, of unequal lengths."""
    folder = tmp_path_factory.mktemp("heads")
    names = ["Paris", "Berlin", "iron"]
    texts = [f"The {names[i % 3]} of land {i}" + " and France" * (i % 4) for i in range(60)]
    rows: dict[str, list[dict[str, Any]]] = {
        "t5": [{"prompt": t, "completion": f"{names[i % 3]} is {i % 7}"} for i, t in enumerate(texts)],
        "classification": [{"text": t, "label": names[i % 3]} for i, t in enumerate(texts)],
        "regression": [{"text": t, "label": 0.5 * (i % 3)} for i, t in enumerate(texts)],
    }
    for name, of_kind in rows.items():
        (folder / name).with_suffix(".jsonl").write_text("".join(json.dumps(r) + "\n" for r in of_kind))
    return {name: str(folder / f"{name}.jsonl") for name in rows}


@pytest.fixture
def trained(
    files: dict[str, str], tokenizer: Any, make_spec: Callable[..., Any]
) -> Callable[..., tuple[Any, Any, Trainer]]:
    """Spec, model and trainer of a kind of model; keywords are settings."""

    def start(
        kind: str,
        head: str = "classification",
        metrics: Any = ("validation_loss",),
        scale: float = 3.0,
        **settings: Any,
    ):
        if kind == "t5":
            spec = make_spec(data=files["t5"], **settings)
        else:
            spec = make_spec(data=files[head], head=head, **settings)
        model = make(kind, len(tokenizer), scale)
        return spec, model, Trainer(spec, model, tokenizer, seed=0, metrics=metrics)

    return start


def as_pairs(batch: list[Example]) -> dict[str, Any]:
    """What transformers' own collator makes of pairs; it pads with 1 and -100."""
    sources = [e.tokens[: e.border] for e in batch]
    said = [e.tokens[e.border :] for e in batch]
    wide, long = max(map(len, sources)), max(map(len, said))
    return {
        "input_ids": [[*s, *[1] * (wide - len(s))] for s in sources],
        "attention_mask": [[1] * len(s) + [0] * (wide - len(s)) for s in sources],
        "labels": [[*s, *[-100] * (long - len(s))] for s in said],
    }


def as_classes(batch: list[Example]) -> dict[str, Any]:
    pairs = as_pairs(batch)
    labels = [int(e.tokens[-1]) for e in batch]
    return {
        **pairs,
        "input_ids": np.where(pairs["attention_mask"], pairs["input_ids"], PAD),
        "labels": labels,
    }


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # accelerate's, on a CPU
@pytest.mark.parametrize("kind", KINDS)
def test_twelve_steps_are_those_of_peft_and_transformers_trainer(
    kind: str, trained: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    # Smaller losses than elsewhere: at 10 the rounding of float32 alone is a tenth of what is allowed.
    _, model, trainer = trained(kind, scale=1.0, batch_size=8)
    examples = trainer._data.parts["train"]
    whole = plan(examples, TrainSettings(batch_size=8, epochs=4), 0)[:12]
    tokens = sum(end for step in whole for _, end in step)
    settings = TrainSettings(rank=4, learning_rate=3e-3, warmup=0, batch_size=8, tokens=tokens)
    # Both start from the head that was fitted to the labels.
    other = make(kind, len(tokenizer), scale=1.0)
    if kind != "t5":
        other.score = torch.nn.Linear(32, 3, bias=False)
        other.num_labels = other.config.num_labels = 3
        other.config.pad_token_id = model.config.pad_token_id
        other.score.weight.data.copy_(model.score.weight)
    config = methods.config(settings, adapters.Targets(model), 0, 12)
    with adapters.adapted(model, settings, config, "cand0000", 0) as adapter:
        ours = Training(trainer._forward, adapter, examples, settings, 0, plan(examples, settings, 0))
        ours.run(model)
    task, collate = ("SEQ_2_SEQ_LM", as_pairs) if kind == "t5" else ("SEQ_CLS", as_classes)
    theirs, _ = of_trainer(other, examples, settings, tmp_path, collate, task)
    assert len(theirs) == 12
    assert ours.losses == pytest.approx(theirs, abs=1e-5)
    assert theirs[-1] < theirs[0] - 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_each_example_alone(kind: str, trained: Callable[..., Any]) -> None:
    _, model, trainer = trained(kind)
    expected = []
    for example in trainer._data.parts["validation"]:
        collate = as_pairs if kind == "t5" else as_classes
        batch = {key: torch.as_tensor(value) for key, value in collate([example]).items()}
        with torch.no_grad():
            expected.append(float(model(**batch).loss))
    assert trainer.losses("validation") == pytest.approx(expected, abs=1e-5)


def test_what_padding_holds_changes_nothing(trained: Callable[..., Any]) -> None:
    """A known bug: pad tokens that are the end token too, and counted as learnt."""
    _, _, trainer = trained("t5")
    long, short = sorted(trainer._data.parts["train"], key=len)[:: len(trainer._data.parts["train"]) - 1]
    with torch.no_grad():
        both, owners = trainer._forward.losses([long, short])
        alone, _ = trainer._forward.losses([short])
    assert both[torch.from_numpy(owners == 1)].tolist() == pytest.approx(alone.tolist(), abs=1e-5)
    assert len(alone) == short.targets.sum()


def test_classes_are_told_and_measured(trained: Callable[..., Any]) -> None:
    names = ("accuracy", "matthews", "f1", "validation_loss")
    spec, model, trainer = trained("llama", metrics=names, epochs=30, learning_rate=1e-2)
    assert trainer.describe()["labels"] == ["Berlin", "Paris", "iron"]
    assert model.config.id2label == {0: "Berlin", 1: "Paris", 2: "iron"}
    untrained = trainer.measure("search", names)[0]
    with trainer.candidate(spec.settings({}), 0, "b"):
        found, truncated = trainer.measure("holdout", names)
    assert truncated is None
    assert found["accuracy"][0] == 1.0 > untrained["accuracy"][0]
    assert found["matthews"][0] == found["f1"][0] == 1.0
    assert found["validation_loss"][0] < 0.2


def test_numbers_are_told_and_measured(trained: Callable[..., Any]) -> None:
    names = ("pearson", "spearman", "validation_loss")
    settings = {"epochs": 30, "learning_rate": 1e-2}
    spec, model, trainer = trained("gpt2", "regression", names, **settings)
    assert model.score.out_features == 1
    with trainer.candidate(spec.settings({}), 0, "b"):
        found, _ = trainer.measure("holdout", names)
    assert found["pearson"][0] > 0.9
    assert found["spearman"][0] > 0.8
    assert found["validation_loss"][0] < 0.05  # mean squared error; the values' variance is 0.17


def test_t5_targets() -> None:
    model = make("t5", 64)
    targets = adapters.Targets(model)
    assert targets.layers == 3
    assert targets.suffixes(TrainSettings(target_modules="mlp")) == ["wi", "wo"]
    assert targets.suffixes(TrainSettings(target_modules="attn")) == ["k", "o", "q", "v"]
    settings = TrainSettings(layers=1, rank=2)
    for adapter in ("lora", "ia3"):
        chosen = TrainSettings(adapter=adapter, layers=1, rank=2)
        with adapters.adapted(model, chosen, methods.config(chosen, targets, 0, 1), "cand0000", 0):
            wrapped = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
        assert wrapped == set(targets.modules(settings))
    assert {".".join(name.split(".")[:3]) for name in wrapped} == {"encoder.block.1", "decoder.block.2"}


def rows_of(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("head", "rows", "message"),
    [
        ("classification", rows_of(*["a"] * 20), r"at least two labels to tell apart, but has only 'a'"),
        ("classification", rows_of("a", 1, *["a"] * 18), r"all labels must be texts or all whole numbers"),
        (
            "classification",
            rows_of(0.5),
            r"line 1: `label` must be a text or a whole number .* got 0.5",
        ),
        ("classification", rows_of(-1), r"`label` must be a text or a whole number >= 0, but got -1"),
        ("classification", [{"text": "a"}], r"must have `text` and `label`, but it has only text"),
        ("regression", rows_of("a"), r"`label` must be a finite number, but got 'a'"),
    ],
)
def test_rows_that_a_head_cannot_learn(
    head: str, rows: list[dict[str, Any]], message: str, make_spec: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(GenomeError, match=message):
        Trainer(make_spec(data=str(path), head=head), make("llama", len(tokenizer)), tokenizer, seed=0)


def test_a_label_that_was_never_learnt(make_spec: Any, tokenizer: Any, tmp_path: Path) -> None:
    for part, labels in (("train", "ab" * 10), ("validation", "abc")):
        (tmp_path / part).write_text("".join(json.dumps(row) + "\n" for row in rows_of(*labels)))
    data = {"train": str(tmp_path / "train"), "validation": str(tmp_path / "validation")}
    with pytest.raises(GenomeError, match=r"validation, line 3: its label must be one of the training"):
        Trainer(make_spec(data=data, head="classification"), make("llama", len(tokenizer)), tokenizer, seed=0)


def test_models_and_rows_that_do_not_fit(
    tiny: Any, tokenizer: Any, make_spec: Any, files: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(GenomeError, match=r"`train.head` needs a model .* but got LlamaForCausalLM"):
        Trainer(make_spec(data=files["classification"], head="classification"), tiny, tokenizer, seed=0)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "one two three"}\n' * 20)
    t5 = make("t5", len(tokenizer))
    with pytest.raises(GenomeError, match=r"line 1: a model with an encoder and a decoder learns `prompt`"):
        Trainer(make_spec(data=str(texts)), t5, tokenizer, seed=0)


@pytest.mark.parametrize(("head", "kind"), [("lm", "t5"), ("classification", "llama")])
def test_long_examples_are_cut_on_both_sides_and_keep_their_label(
    head: str, kind: str, tokenizer: Any, make_spec: Any, files: dict[str, str]
) -> None:
    file = files["t5" if head == "lm" else head]
    spec = make_spec(data={"train": file, "max_length": 6, "too_long": "cut"}, head=head)
    trainer = Trainer(spec, make(kind, len(tokenizer)), tokenizer, seed=0)
    facts = trainer.describe()
    assert facts["cut"]["train"] > 20
    for example in trainer._data.parts["train"]:
        assert example.border <= 6
        assert len(example) - example.border <= (6 if head == "lm" else 1)
        assert example.targets.sum() == len(example) - example.border
    assert np.isfinite(trainer.losses("validation")).all()
