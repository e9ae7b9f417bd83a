"""The settings of a training, to copy: as Python for peft and TRL, as YAML for axolotl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml

from llmevo.genome.train import TrainSettings
from llmevo.train import methods

_IN_AXOLOTL = ("lora", "rslora", "dora", "loraplus", "pissa", "qlora")
_NOTES = {
    "lorafa": "# LoRA-FA: freeze every parameter with `.lora_A.` in its name before training.",
    "deltalora": "# Delta-LoRA is not in peft: this is the LoRA whose product moves the base weights, too.\n"
    "# What was trained here is saved as a LoRA of twice the rank, which plain peft loads.",
}
_FROM_BASE = "# The adapter starts from the base weights, which change: save it with\n"
_FROM_BASE += "# `path_initial_model_for_weight_conversion`."
_NF4 = """\
import torch
from transformers import {kind}, BitsAndBytesConfig

quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
# model = {kind}.from_pretrained(BASE{more}, dtype=torch.bfloat16, quantization_config=quantization)
# The adapter that was trained here: PeftModel.from_pretrained(model, "best/adapter")"""
_HEAD = """\
# The head `score` is trained in full and saved with the adapter: `task_type` sees to it.
# model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=...)"""
_MODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
}
_CHAT = """\
# TRL takes the answers of a chat from a template with `{% generation %}` marks; without them here, each of
# the assistant's turns was learnt to its end."""
_WARM = "# Trainer's warm-up begins at 0. Here the first step had a share of the learning rate already."
_PAGED = "paged_adamw_8bit"
_ARGUMENTS = {
    "CAUSAL_LM": ("trl", "SFTConfig"),
    "SEQ_2_SEQ_LM": ("transformers", "Seq2SeqTrainingArguments"),
    "SEQ_CLS": ("transformers", "TrainingArguments"),
}
_PLAIN = {  # the configuration's name in peft, and the fields that we set
    "randlora": ("RandLora", ("r", "randlora_alpha", "randlora_dropout", "projection_prng_key")),
    "shira": ("Shira", ("r", "random_seed")),
    "loha": ("LoHa", ("r", "alpha")),
    "lokr": ("LoKr", ("r", "alpha")),
    "miss": ("Miss", ("r", "miss_dropout")),
    "oft": ("OFT", ("oft_block_size",)),
    "fourierft": ("FourierFT", ("n_frequency", "random_loc_seed", "init_weights")),
    "vblora": ("VBLoRA", ("r", "vector_length", "vblora_dropout")),
}


def snippet(
    settings: TrainSettings,
    adapter: Mapping[str, Any],
    steps: int,
    longest: int | None,
    *,
    chat: bool = False,
) -> str:
    """Python that makes `peft_config` and `args`: TRL's, or transformers' for what is no causal model.

    Args:
        settings: The hyperparameters.
        adapter: The content of the trained adapter's adapter_config.json; says the modules.
        steps: Optimizer steps of the training, of which the warm-up is a share.
        longest: Longest example in tokens; None for the model's context.
        chat: Whether the examples are `messages`.
    """
    task = adapter["task_type"]
    parts = [_peft(settings, adapter, steps), _arguments(settings, task, steps, longest, chat)]
    notes = [_CHAT] if chat else []
    if _warm(settings, steps):
        notes.append(_WARM)
    parts += ["\n".join(notes)] if notes else []
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
    if task == "SEQ_CLS":
        parts.append(_HEAD)
    if settings.adapter == "qlora":
        labels = ", num_labels=..." if task == "SEQ_CLS" else ""
        parts.append(_NF4.format(kind=_MODELS[task], more=labels))
    if settings.starts_from_base:
        parts.append(_FROM_BASE)
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
    if adapter["task_type"] != "CAUSAL_LM":
        what = "an encoder and a decoder" if adapter["task_type"] == "SEQ_2_SEQ_LM" else "a head"
        return (
            f"# axolotl's LoRA is for causal language models, not for {what}: take the settings for peft and "
            "transformers.\n"
        )
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
    flags = methods.lora_fields(settings).items()
    given |= {f"peft_{key}": value for key, value in flags if key not in ("r", "lora_alpha", "lora_dropout")}
    if settings.adapter == "qlora":  # NF4 and double quantisation are its defaults
        given |= {"adapter": "qlora", "load_in_4bit": True}
    if settings.adapter == "loraplus":
        given["loraplus_lr_ratio"] = settings.loraplus_ratio
    optimizer = _PAGED if settings.adapter == "qlora" else "adamw_torch"
    given |= {"optimizer": optimizer, "learning_rate": settings.learning_rate}
    given |= {"lr_scheduler" + key: value for key, value in _schedule(settings, steps).items()}
    given |= {
        "warmup_steps": _warm(settings, steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "micro_batch_size": settings.batch_size // _parts(settings),
        "gradient_accumulation_steps": _parts(settings),
        "gradient_checkpointing": settings.checkpointing,
        **_length(settings, steps, "num_epochs"),
        "sample_packing": False,
        "train_on_inputs": False,
    }
    if longest is None:
        notes.append("# sequence_len is 512 where it is not set, and longer examples are dropped.")
    else:
        given["sequence_len"] = longest
    if settings.starts_from_base:
        notes.append(_FROM_BASE)
    return "\n".join(notes) + "\n" + yaml.safe_dump(given, sort_keys=False, width=110)


def _schedule(settings: TrainSettings, steps: int) -> dict[str, Any]:
    """The learning rate's course after the warm-up; the keys follow `lr_scheduler`."""
    if settings.schedule != "wsd":
        return {"": "constant_with_warmup"}
    falling = math.floor(settings.decay * steps)
    return {"": "warmup_stable_decay", "_kwargs": {"num_decay_steps": falling, "decay_type": "linear"}}


def _warm(settings: TrainSettings, steps: int) -> int:
    """Steps before the full learning rate: ours has its first share in step 0, transformers' is 0 there."""
    return max(math.ceil(settings.warmup * steps) - 1, 0)


def _parts(settings: TrainSettings) -> int:
    """In how many equal parts a batch goes through the model; here they may be unequal, and so fewer."""
    size = settings.batch_size
    return next(count for count in range(settings.accumulation, size + 1) if size % count == 0)


def _length(settings: TrainSettings, steps: int, epochs: str) -> dict[str, Any]:
    """How long to train: a budget in tokens is one in steps there."""
    return {epochs: settings.epochs} if settings.tokens is None else {"max_steps": steps}


def _peft(settings: TrainSettings, adapter: Mapping[str, Any], steps: int) -> str:
    given: dict[str, Any] = {"target_modules": sorted(adapter["target_modules"])}
    name = {"ia3": "IA3Config", "vera": "VeraConfig", "adalora": "AdaLoraConfig"}.get(settings.adapter)
    if settings.adapter == "ia3":
        given["feedforward_modules"] = sorted(adapter["feedforward_modules"])
    elif adapter.get("layers_to_transform") is not None:
        given["layers_to_transform"] = adapter["layers_to_transform"]
    if settings.adapter in _PLAIN:
        kind, fields = _PLAIN[settings.adapter]
        name = f"{kind}Config"
        given |= {field: adapter[field] for field in fields}
    elif settings.adapter == "vera":
        given |= {"r": settings.rank, "vera_dropout": settings.dropout}
        given["projection_prng_key"] = adapter["projection_prng_key"]
    elif settings.adapter == "adalora":
        given |= methods.adalora_ranks(settings.rank, steps)
        given |= {"lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    elif settings.adapter != "ia3":
        given |= methods.lora_fields(settings)
    given["task_type"] = adapter["task_type"]
    name = name or "LoraConfig"
    return f"from peft import {name}\n\npeft_config = {_call(name, given)}"


def _arguments(settings: TrainSettings, task: str, steps: int, longest: int | None, chat: bool) -> str:
    course = _schedule(settings, steps)
    given: dict[str, Any] = {
        "output_dir": "trained",
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": course.pop(""),
        **{"lr_scheduler" + key: value for key, value in course.items()},
        "warmup_steps": _warm(settings, steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "per_device_train_batch_size": settings.batch_size // _parts(settings),
        "gradient_accumulation_steps": _parts(settings),
        "gradient_checkpointing": settings.checkpointing,
        **_length(settings, steps, "num_train_epochs"),
    }
    library, kind = _ARGUMENTS[task]
    if library == "trl":
        given |= {"max_length": longest, "packing": False}
        given |= {"assistant_only_loss": True} if chat else {}
    if settings.adapter == "qlora":
        given["optim"] = _PAGED
    return f"from {library} import {kind}\n\nargs = {_call(kind, given)}"


def _call(name: str, given: Mapping[str, Any]) -> str:
    lines = "".join(f"    {key}={_literal(value)},\n" for key, value in given.items())
    return f"{name}(\n{lines})"


def _literal(value: Any) -> str:
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return repr(value)
