"""A trained adapter and the model it belongs on, as one model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from llmevo.errors import GenomeError
from llmevo.train.classify import head_options
from llmevo.train.generate import filler
from llmevo.train.trainer import RECORD

_LOADERS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
}


def fuse(model: Path, adapter: Path) -> None:
    """Add an adapter to the weights of a model in a folder, in place; the folder is whole at any time.

    The sum is computed in float32 and rounded once, to the dtype that the weights are stored in. QLoRA's
    adapter is added to what NF4 leaves of the weights, on which it was trained and scored.

    Args:
        model: Folder of a transformers model, as `merge.export` writes it.
        adapter: Folder of a peft adapter.

    Raises:
        GenomeError: The adapter does not belong on this model.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoConfig

    from llmevo.train import nf4
    from llmevo.train.adapters import quiet_peft

    dtype = AutoConfig.from_pretrained(str(model)).dtype or torch.bfloat16
    base = _base(model, adapter)
    if _on_nf4(adapter):
        for module in map(base.get_submodule, nf4.modules(base)):
            module.weight.data = nf4.round_trip(module)
    try:
        with quiet_peft():
            merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise GenomeError(f"`{adapter}` cannot be added to the model `{model}`: {reason}") from error
    beside = model.with_name(f".{model.name}.fused")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        merged.to(dtype).save_pretrained(str(beside))
        for file in model.iterdir():  # the tokenizer, the recipe, the card
            if file.is_file() and ".safetensors" not in file.name and not (beside / file.name).exists():
                shutil.copyfile(file, beside / file.name)
        old = model.with_name(f".{model.name}.merged")
        os.rename(model, old)
        os.rename(beside, model)
        shutil.rmtree(old)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _on_nf4(adapter: Path) -> bool:
    """Whether an adapter was trained here as QLoRA's."""
    record = adapter / RECORD
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    return bool(known.get("settings", {}).get("adapter") == "qlora")


def _base(model: Path, adapter: Path) -> Any:
    """The model in float32 as what the adapter was trained on, with room for a head's outputs."""
    import torch
    import transformers

    kind = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["task_type"]
    options: dict[str, Any] = {"dtype": torch.float32}
    if kind == "SEQ_CLS":
        labels = json.loads((adapter / RECORD).read_text(encoding="utf-8"))["labels"]
        options |= head_options(labels)
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # that the model has no head yet is known
    try:
        base = getattr(transformers, _LOADERS[kind]).from_pretrained(str(model), **options)
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    if kind == "SEQ_CLS" and base.config.get_text_config().pad_token_id is None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(model))
        base.config.get_text_config().pad_token_id = filler(tokenizer)
    return base
