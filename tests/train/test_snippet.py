"""Settings to copy: axolotl's keys, and what it cannot do."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import yaml

from llmevo.genome.train import ADAPTERS, TrainSettings
from llmevo.train.loop import learning_rate
from llmevo.train.snippet import axolotl, snippet

MODULES = {"target_modules": ["v_proj", "q_proj"], "task_type": "CAUSAL_LM"}

# Of axolotl's schemas peft.py, training.py and config.py; the value is a type that pydantic takes there.
SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("lora_r", "lora_alpha", "micro_batch_size", "gradient_accumulation_steps"), int),
    **dict.fromkeys(("max_steps", "warmup_steps", "sequence_len"), int),
    **dict.fromkeys(("lora_dropout", "learning_rate", "weight_decay", "max_grad_norm", "num_epochs"), float),
    **dict.fromkeys(("adapter", "lr_scheduler", "optimizer", "peft_init_lora_weights"), str),
    **dict.fromkeys(("peft_use_rslora", "peft_use_dora", "sample_packing", "train_on_inputs"), bool),
    "load_in_4bit": bool,
    **dict.fromkeys(("lora_target_modules", "peft_layers_to_transform"), list),
    "loraplus_lr_ratio": float,
    "lr_scheduler_kwargs": dict,
    "gradient_checkpointing": bool,
}


def written(longest: int | None = 128, **given: Any) -> tuple[dict[str, Any] | None, str]:
    layers = given.pop("layers_to_transform", None)
    text = axolotl(TrainSettings(**given), {**MODULES, "layers_to_transform": layers}, 40, longest)
    return yaml.safe_load(text), text


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_axolotl_knows_every_key_or_a_comment_says_why(adapter: str, schedule: str) -> None:
    found, text = written(adapter=adapter, schedule=schedule, learning_rate=3e-5, tokens=900)
    if found is None:
        assert f"not {adapter}" in text
        return
    assert found["adapter"] == ("qlora" if adapter == "qlora" else "lora")
    assert found["lora_target_modules"] == ["q_proj", "v_proj"]
    assert found["max_steps"] == 40
    assert "num_epochs" not in found
    for key, value in found.items():
        assert type(value) is SCHEMA[key], key


def test_each_kind_of_lora_has_its_own_key() -> None:
    own = {"rslora": "peft_use_rslora", "dora": "peft_use_dora", "pissa": "peft_init_lora_weights"}
    own["loraplus"] = "loraplus_lr_ratio"
    for adapter in ("lora", *own):
        found, _ = written(adapter=adapter)
        assert found is not None
        assert set(found) & set(own.values()) == ({own[adapter]} if adapter in own else set())


def test_the_same_batch_length_and_course() -> None:
    found, _ = written(batch_size=12, accumulation=3, epochs=2.5, schedule="wsd", warmup=0.1, decay=0.2)
    assert found is not None
    assert (found["micro_batch_size"], found["gradient_accumulation_steps"]) == (4, 3)
    assert (found["num_epochs"], found["warmup_steps"]) == (2.5, 3)
    assert found["lr_scheduler_kwargs"]["num_decay_steps"] == 8
    assert "max_steps" not in found


@pytest.mark.parametrize(
    ("size", "parts", "whole"), [(10, 4, 5), (16, 3, 4), (7, 2, 7), (8, 8, 8), (6, 1, 1)]
)
def test_a_step_has_as_many_examples_as_here(size: int, parts: int, whole: int) -> None:
    """Trainer's parts are equal; those of a batch here need not be."""
    settings = TrainSettings(batch_size=size, accumulation=parts)
    python = snippet(settings, MODULES, 40, None)
    assert f"gradient_accumulation_steps={whole}," in python
    assert f"per_device_train_batch_size={size // whole}," in python
    found, _ = written(batch_size=size, accumulation=parts)
    assert found is not None
    assert found["micro_batch_size"] * found["gradient_accumulation_steps"] == size


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
@pytest.mark.parametrize(("warmup", "same"), [(0.0, True), (0.02, True), (0.1, False)])
def test_transformers_schedule_is_ours_but_for_the_warm_up(schedule: str, warmup: float, same: bool) -> None:
    """One step of warm-up is none in transformers, whose first would have no learning rate at all."""
    torch = pytest.importorskip("torch")
    from transformers.optimization import get_scheduler

    settings = TrainSettings(schedule=schedule, warmup=warmup, learning_rate=1e-3)
    python = snippet(settings, MODULES, 40, None)
    given = {
        line.split("=")[0].strip(): line.split("=", 1)[1].rstrip(",")
        for line in python.splitlines()
        if "=" in line
    }
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    course = get_scheduler(
        ast.literal_eval(given["lr_scheduler_type"]),
        optimizer,
        num_warmup_steps=int(given["warmup_steps"]),
        num_training_steps=40,
        scheduler_specific_kwargs=ast.literal_eval(given.get("lr_scheduler_kwargs", "None")),
    )
    rates = []
    for _ in range(40):
        rates.append(course.get_last_lr()[0])
        optimizer.step()
        course.step()
    ours = [learning_rate(settings, step, 40) for step in range(40)]
    first = 0 if same else 3
    assert rates[first:] == pytest.approx(ours[first:])
    assert (rates == pytest.approx(ours)) == same
    assert ("begins at 0" in python) != same


def test_of_a_chat_the_answers_are_learnt() -> None:
    assert "assistant_only_loss=True," in snippet(TrainSettings(), MODULES, 40, None, chat=True)
    assert "assistant_only_loss" not in snippet(TrainSettings(), MODULES, 40, None)


def test_what_axolotl_rounds_or_cuts_is_said() -> None:
    found, text = written(None, alpha=12.4, layers_to_transform=[28, 29])
    assert found is not None
    assert found["lora_alpha"] == 12
    assert found["peft_layers_to_transform"] == [28, 29]
    assert "12.4" in text
    assert "sequence_len" in text
    assert "sequence_len" not in found


@pytest.mark.parametrize(
    ("task", "kind"),
    [("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"), ("SEQ_CLS", "AutoModelForSequenceClassification")],
)
def test_what_is_no_causal_model_has_its_own_class_and_no_axolotl(task: str, kind: str) -> None:
    adapter, settings = {**MODULES, "task_type": task}, TrainSettings(adapter="qlora")
    python = snippet(settings, adapter, 40, None)
    compile(python, "snippet", "exec")
    assert f"import {kind}, BitsAndBytesConfig" in python
    assert "trl" not in python
    assert ("num_labels=..." in python) == ("`score`" in python) == (task == "SEQ_CLS")
    text = axolotl(settings, adapter, 40, None)
    assert yaml.safe_load(text) is None
    assert "axolotl's LoRA is for causal language models" in text
