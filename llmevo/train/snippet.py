"""The settings of a training, to copy: as Python for peft and TRL, as YAML for axolotl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml

from llmevo.genome.train import TrainSettings

_FLAGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa_niter_16"},
}
# axolotl trains LoRA alone; these are LoRA with other settings.
_IN_AXOLOTL: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"peft_use_rslora": True},
    "dora": {"peft_use_dora": True},
    "loraplus": {},
    "pissa": {"peft_init_lora_weights": _FLAGS["pissa"]["init_lora_weights"]},
}
_NOTES = {
    "lorafa": "# LoRA-FA: freeze every parameter with `.lora_A.` in its name before training.",
    "pissa": "# PiSSA changes the base weights: save with `path_initial_model_for_weight_conversion`.",
}


def snippet(settings: TrainSettings, adapter: Mapping[str, Any], steps: int, longest: int | None) -> str:
    """Python that makes `peft_config` and TRL's `args`.

    Args:
        settings: The hyperparameters.
        adapter: The content of the trained adapter's adapter_config.json; says the modules.
        steps: Optimizer steps of the training, of which the warm-up is a share.
        longest: Longest example in tokens; None for the model's context.
    """
    parts = [_peft(settings, adapter, steps), _trl(settings, steps, longest)]
    if settings.adapter == "loraplus":
        parts.append(
            "# LoRA+: pass `optimizers=(optimizer, None)` to the trainer, with\n"
            "from peft.optimizers import create_loraplus_optimizer\n"
            "import torch\n\n"
            "make_optimizer = lambda model: create_loraplus_optimizer(\n"
            f"    model, torch.optim.AdamW, lr={settings.learning_rate!r}, "
            f"loraplus_lr_ratio={settings.loraplus_ratio!r}, "
            f"loraplus_weight_decay={settings.weight_decay!r}\n)"
        )
    if settings.adapter in _NOTES:
        parts.append(_NOTES[settings.adapter])
    return "\n\n".join(parts) + "\n"


def axolotl(settings: TrainSettings, adapter: Mapping[str, Any], steps: int, longest: int | None) -> str:
    """The keys of an axolotl configuration, as YAML; what axolotl cannot do is said in a comment.

    Args:
        settings: The hyperparameters.
        adapter: The content of the trained adapter's adapter_config.json; says the modules.
        steps: Optimizer steps of the training, of which the warm-up is a share.
        longest: Longest example in tokens; None for the model's context.
    """
    if settings.adapter not in _IN_AXOLOTL:
        return f"# axolotl trains LoRA, not {settings.adapter}: take the settings for peft and TRL.\n"
    notes = ["# Beside these: `base_model` and `datasets`."]
    given: dict[str, Any] = {"adapter": "lora", "lora_r": settings.rank}
    given |= {"lora_alpha": round(settings.alpha) or 1, "lora_dropout": settings.dropout}
    if given["lora_alpha"] != settings.alpha:
        notes.append(f"# lora_alpha was {settings.alpha:g}; axolotl takes whole numbers.")
    given["lora_target_modules"] = sorted(adapter["target_modules"])
    if adapter.get("layers_to_transform") is not None:
        given["peft_layers_to_transform"] = adapter["layers_to_transform"]
    given |= _IN_AXOLOTL[settings.adapter]
    if settings.adapter == "loraplus":
        given["loraplus_lr_ratio"] = settings.loraplus_ratio
    given |= {"optimizer": "adamw_torch", "learning_rate": settings.learning_rate}
    given |= {"lr_scheduler" + key: value for key, value in _schedule(settings, steps).items()}
    given |= {
        "warmup_steps": _warm(settings, steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "micro_batch_size": _batch(settings),
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_checkpointing": settings.checkpointing,
        **_length(settings, steps, "num_epochs"),
        "sample_packing": False,
        "train_on_inputs": False,
    }
    if longest is None:
        notes.append("# sequence_len is 512 where it is not set, and longer examples are dropped.")
    else:
        given["sequence_len"] = longest
    if settings.adapter in _NOTES:
        notes.append(_NOTES[settings.adapter])
    return "\n".join(notes) + "\n" + yaml.safe_dump(given, sort_keys=False, width=110)


def _schedule(settings: TrainSettings, steps: int) -> dict[str, Any]:
    """The learning rate's course after the warm-up; the keys follow `lr_scheduler`."""
    if settings.schedule != "wsd":
        return {"": "constant_with_warmup"}
    falling = math.floor(settings.decay * steps)
    return {"": "warmup_stable_decay", "_kwargs": {"num_decay_steps": falling, "decay_type": "linear"}}


def _warm(settings: TrainSettings, steps: int) -> int:
    return math.ceil(settings.warmup * steps)


def _batch(settings: TrainSettings) -> int:
    """Examples that go through the model together."""
    return math.ceil(settings.batch_size / settings.accumulation)


def _length(settings: TrainSettings, steps: int, epochs: str) -> dict[str, Any]:
    """How long to train: a budget in tokens is one in steps there."""
    return {epochs: settings.epochs} if settings.tokens is None else {"max_steps": steps}


def _peft(settings: TrainSettings, adapter: Mapping[str, Any], steps: int) -> str:
    given: dict[str, Any] = {"target_modules": sorted(adapter["target_modules"])}
    name: str | None = {"ia3": "IA3Config", "vera": "VeraConfig", "adalora": "AdaLoraConfig"}.get(
        settings.adapter
    )
    if settings.adapter == "ia3":
        given["feedforward_modules"] = sorted(adapter["feedforward_modules"])
    elif adapter.get("layers_to_transform") is not None:
        given["layers_to_transform"] = adapter["layers_to_transform"]
    if settings.adapter == "vera":
        given |= {"r": settings.rank, "vera_dropout": settings.dropout}
    elif settings.adapter == "adalora":
        given |= {"target_r": settings.rank, "init_r": math.ceil(1.5 * settings.rank), "total_step": steps}
        given |= {"tinit": steps // 10, "tfinal": steps // 3}
        given |= {"lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    elif settings.adapter != "ia3":
        given |= {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    given.update(_FLAGS.get(settings.adapter, {}))
    given["task_type"] = "CAUSAL_LM"
    name = name or "LoraConfig"
    return f"from peft import {name}\n\npeft_config = {_call(name, given)}"


def _trl(settings: TrainSettings, steps: int, longest: int | None) -> str:
    course = _schedule(settings, steps)
    given: dict[str, Any] = {
        "output_dir": "trained",
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": course.pop(""),
        **{"lr_scheduler" + key: value for key, value in course.items()},
        "warmup_steps": _warm(settings, steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "per_device_train_batch_size": _batch(settings),
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_checkpointing": settings.checkpointing,
        **_length(settings, steps, "num_train_epochs"),
        "max_length": longest,
        "packing": False,
    }
    return f"from trl import SFTConfig\n\nargs = {_call('SFTConfig', given)}"


def _call(name: str, given: Mapping[str, Any]) -> str:
    lines = "".join(f"    {key}={_literal(value)},\n" for key, value in given.items())
    return f"{name}(\n{lines})"


def _literal(value: Any) -> str:
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return repr(value)
