"""Genomes that train one model which is no causal one: searched, kept, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from choice_task import sums, write_choice_task

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("lm_eval")

from test_heads import files, make  # noqa: E402, F401

from llmevo.errors import GenomeError  # noqa: E402
from llmevo.genome import Genome  # noqa: E402
from llmevo.merge import copy_of  # noqa: E402
from llmevo.pipeline import Job, MergePipeline  # noqa: E402
from llmevo.runner import facts  # noqa: E402
from llmevo.train.fuse import fuse  # noqa: E402
from llmevo.train.snippet import snippet  # noqa: E402


def genome(folder: Path, data: str, run: Path, **train: Any) -> Genome:
    """One model, one adapter gene; scored by the loss, with other metrics beside it."""
    tasks = train.pop("tasks")
    return Genome.model_validate(
        {
            "genome": {"models": [str(folder)], "dtype": "float32", "num_layers": 2},
            "tasks": ["validation_loss", *({"name": name, "weight": 0} for name in tasks)],
            "train": {
                "data": data,
                "adapter": {"choice": ["lora", "ia3"]},
                "rank": 4,
                "learning_rate": 1e-2,
                "batch_size": 8,
                **train,
            },
            "evaluate": {"device": "cpu", "dtype": "float32"},
            "run": {"cache": False, "dir": str(run)},
        }
    )


def saved(kind: str, folder: Path, tokenizer: Any) -> Path:
    """A model's folder; a GPT-2 without a head, as one has it from elsewhere."""
    model = make(kind, len(tokenizer))
    if kind == "gpt2":
        from transformers import GPT2LMHeadModel

        whole = GPT2LMHeadModel(model.config)
        whole.transformer.load_state_dict(model.transformer.state_dict())
        model = whole
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # its name yet
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_trial_is_measured_after_each_epoch_and_exported(
    kind: str,
    tokenizer: Any,
    files: dict[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    import transformers

    folder = saved(kind, tmp_path / "model", tokenizer)
    head = "lm" if kind == "t5" else "classification"
    tasks = ["rouge1", "bleu"] if kind == "t5" else ["accuracy"]
    data = files["t5" if kind == "t5" else head]
    spec = genome(folder, data, tmp_path / "run", head=head, each_epoch=True, epochs=3, tasks=tasks)
    pipeline = MergePipeline(spec)
    recipe = {"merge_method": "passthrough", "models": [{"model": str(folder)}], "dtype": "float32"}
    shown = facts.lines(pipeline.describe(), None)
    assert any(line.startswith("memory: resident on cpu, the merged model") for line in shown)
    plain = pipeline.run(Job(0, {}, seed=0, recipe=recipe))
    outcome = pipeline.run(Job(1, {"train.adapter": "lora"}, seed=0))
    assert plain.error is None is outcome.error
    assert outcome.score.value > plain.score.value
    epochs = [outcome.metrics[f"epoch {number}"] for number in (1, 2, 3)]
    assert [epoch["epochs"] for epoch in epochs] == [1.0, 2.0, 3.0]
    assert all({"validation_loss", *tasks} <= set(epoch) for epoch in epochs)
    for task in ("validation_loss", *tasks):
        (value,) = (v for name, v in outcome.metrics[task].items() if not name.startswith("truncated"))
        assert epochs[-1][task] == pytest.approx(value, abs=1e-6)
    assert epochs[0]["validation_loss"] > epochs[-1]["validation_loss"]
    # What is kept is loaded for the held-out items, not trained again; its history stays.
    again = pipeline.run(Job(1, {"train.adapter": "lora"}, seed=0, split="holdout"))
    assert again.metrics["epoch 3"] == epochs[-1]
    adapter, out = tmp_path / "run" / "adapters" / "trial0001", tmp_path / "out"
    copy_of(spec.genome, out, "a card")
    fuse(out, adapter)
    auto = "AutoModelForSeq2SeqLM" if kind == "t5" else "AutoModelForSequenceClassification"
    fused = getattr(transformers, auto).from_pretrained(out).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    given = {"input_ids": ids, "decoder_input_ids": ids} if kind == "t5" else {"input_ids": ids}
    with (
        pipeline._candidate(Job(1, {"train.adapter": "lora"}, seed=0), recipe),
        torch.no_grad(),
    ):
        wanted = pipeline._merger.model(**given).logits
        torch.testing.assert_close(fused(**given).logits, wanted, atol=1e-4, rtol=0)
    made: dict[str, Any] = {}
    config = json.loads((adapter / "adapter_config.json").read_text())
    exec(snippet(spec.train.settings({"train.adapter": "lora"}), config, 18, None), made)
    assert made["peft_config"].task_type == config["task_type"]
    assert (made["args"].num_train_epochs, made["args"].learning_rate) == (3, 1e-2)
    if kind == "gpt2":
        assert fused.config.id2label == {0: "Berlin", 1: "Paris", 2: "iron"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["rouge1"]}, r"`tasks` names rouge1, which a model with `train.head: classification`"),
        ({"tasks": ["arc_easy"]}, r"`tasks` names arc_easy, which a model with `train.head: classificat"),
        ({"genome": {"models": ["a", "b"]}}, r"`train.head` must be lm where models are merged"),
    ],
)
def test_what_a_head_cannot_do_is_refused_in_the_genome(change: dict[str, Any], message: str) -> None:
    data = {
        "genome": {"models": ["m"]},
        "tasks": ["accuracy"],
        "train": {"data": "f", "head": "classification", "rank": {"int": [1, 4]}},
    }
    with pytest.raises(ValueError, match=message):
        Genome.model_validate({**data, **change})


def test_a_model_with_an_adapter_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from llmevo.genome import MergeSpec
    from llmevo.merge import Loaded

    folder = saved("t5", tmp_path / "model", tokenizer)
    wrapped = peft.get_peft_model(
        make("t5", len(tokenizer)), peft.LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    spec = MergeSpec(models=[f"{folder}+{tmp_path / 'adapter'}"], dtype="float32")
    with pytest.raises(GenomeError, match=r"must not have an adapter in .* where a head or an encoder"):
        Loaded(spec, "lm", seed=0, device="cpu", dtype="float32")


def test_lm_evals_tasks_score_an_encoder_and_a_decoder(
    tokenizer: Any,
    files: dict[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Log-likelihoods are the model's own loss, and a task that generates is answered."""
    from transformers import T5ForConditionalGeneration

    config = make("t5", len(tokenizer)).config
    config.num_decoder_layers = 2  # transformers' generate takes as many as the encoder has
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config).eval()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    items = sums(range(12))
    asked = [torch.tensor([tokenizer(item["q"]).input_ids]) for item in items]
    with torch.no_grad():
        said = [model.generate(ids, max_new_tokens=5, do_sample=False)[0] for ids in asked]
        truth = []
        for ids, item in zip(asked, items, strict=True):
            answers = [torch.tensor([tokenizer(f" {choice}").input_ids]) for choice in item["choices"]]
            likely = [-a.shape[1] * model(input_ids=ids, labels=a).loss for a in answers]
            truth.append(float(torch.stack(likely).log_softmax(0)[item["gold"]]))
    texts = [tokenizer.decode(ids, skip_special_tokens=True).split("@@")[0] for ids in said]
    spoken = [{**item, "said": text} for item, text in zip(items, texts, strict=True)]
    write_choice_task(tmp_path, "sums", {"test": items})
    write_choice_task(tmp_path, "said", {"test": spoken})
    task = yaml.safe_load((tmp_path / "said.yaml").read_text())
    task |= {"output_type": "generate_until", "doc_to_target": "{{said}}"}
    task["generation_kwargs"] = {"until": ["@@"], "max_gen_toks": 5}
    task["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    (tmp_path / "said.yaml").write_text(
        yaml.safe_dump({k: v for k, v in task.items() if k != "doc_to_choice"})
    )
    # A training runs first; with such a rate it leaves the model as it is.
    still = genome(folder, files["t5"], tmp_path / "run", tasks=[], learning_rate=1e-15)
    data = still.model_dump(by_alias=True)
    data["tasks"] = [
        {"name": "sums", "metric": "gold_logprob,none"},
        {"name": "said", "metric": "exact_match,none"},
    ]
    data["evaluate"]["task_path"] = [str(tmp_path)]
    data["apply_chat_template"] = False
    pipeline = MergePipeline(Genome.model_validate(data))
    recipe = {"merge_method": "passthrough", "models": [{"model": str(folder)}], "dtype": "float32"}
    outcome = pipeline.run(Job(0, {}, seed=0, recipe=recipe))
    assert outcome.error is None
    assert outcome.metrics["said"]["exact_match,none"] == 1.0
    found = outcome.score.items["sums"]
    assert len(found) > 5  # the others are held out
    assert all(min(abs(one - value) for value in truth) < 1e-4 for one in found)
    assert pipeline.describe()["packed"]["why_not"] == "it is an encoder and a decoder"
