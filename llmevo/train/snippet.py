"""The settings of a training as Python for peft and TRL, to copy and run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmevo.genome.train import TrainSettings

_FLAGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa_niter_16"},
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
    warm = math.ceil(settings.warmup * steps)
    given: dict[str, Any] = {
        "output_dir": "trained",
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": warm,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "per_device_train_batch_size": math.ceil(settings.batch_size / settings.accumulation),
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_checkpointing": settings.checkpointing,
    }
    if settings.schedule == "wsd":
        falling = math.floor(settings.decay * steps)
        given["lr_scheduler_type"] = "warmup_stable_decay"
        given["lr_scheduler_kwargs"] = {"num_decay_steps": falling, "decay_type": "linear"}
    # A budget in tokens is one in steps there.
    if settings.tokens is None:
        given["num_train_epochs"] = settings.epochs
    else:
        given["max_steps"] = steps
    given |= {"max_length": longest, "packing": False}
    return f"from trl import SFTConfig\n\nargs = {_call('SFTConfig', given)}"


def _call(name: str, given: Mapping[str, Any]) -> str:
    lines = "".join(f"    {key}={_literal(value)},\n" for key, value in given.items())
    return f"{name}(\n{lines})"


def _literal(value: Any) -> str:
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return repr(value)
