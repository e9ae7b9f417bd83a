"""A trained adapter and the model it belongs on, as one model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from llmevo.errors import GenomeError
from llmevo.train.trainer import RECORD


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
    from transformers import AutoConfig, AutoModelForCausalLM

    from llmevo.train import nf4
    from llmevo.train.adapters import linear_layers, quiet_peft

    dtype = AutoConfig.from_pretrained(str(model)).dtype or torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    if _on_nf4(adapter):
        for module in map(base.get_submodule, linear_layers(base)):
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
