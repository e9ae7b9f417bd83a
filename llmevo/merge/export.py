"""A recipe as a model on disk, written by mergekit itself."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmevo.errors import GenomeError
from llmevo.genome import yamltext
from llmevo.merge import weights
from llmevo.merge.references import Located, locate, names, plain_reference, substitute

_CARD = """---
library_name: transformers
tags:
- merge
- mergekit
- llmevo
---
# {name}

A merge of language models, computed by [mergekit](https://github.com/arcee-ai/mergekit) ({method}) from a
recipe that llmevo found.

Models:

{models}

```yaml
{recipe}```
"""


def export(
    recipe: dict[str, Any],
    out_dir: str | os.PathLike[str],
    *,
    card: str | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Run mergekit on a recipe: safetensors, configuration, tokenizer and model card.

    The weights are those that `Merger.merge(recipe, seed)` gave, in the recipe's dtype. That includes the
    random masks of DARE and DELLA, which follow from the seed and the order of the tensors: the order is the
    same, and adapters are applied before the seed is set, because peft draws random numbers too. Masks drawn
    on a GPU differ from those drawn on a CPU, so `device` must be of the kind that the trial ran on.

    Args:
        recipe: A mergekit configuration as plain data. It is written to `mergekit_config.yml` as it is.
        out_dir: Must be absent or empty. It appears whole or not at all: mergekit writes into a folder
            beside it, which takes its name when everything is on the disk.
        card: Text of README.md; None for a short one that names the models and shows the recipe.
        seed: Of random masks, as for `Merger.merge`.
        device: Where mergekit computes.

    Returns:
        `out_dir`.

    Raises:
        GenomeError: If `out_dir` is not empty, a model cannot be found, or mergekit refuses the recipe.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GenomeError(f"`out_dir` must be a new or an empty folder, and {out} is not: choose another")
    located = {name: locate(name) for name in names(recipe)}
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    # Full copies of adapted models, which mergekit reads from the disk; as large as the models.
    adapted = Path(tempfile.mkdtemp(prefix=f".{out.name}-adapters-", dir=out.parent))
    try:
        _merge(recipe, located, beside, adapted, seed=seed, device=device)
        text = yamltext.dump(recipe)
        (beside / "mergekit_config.yml").write_text(text, encoding="utf-8")
        (beside / "README.md").write_text(card or _own_card(recipe, out.name, text), encoding="utf-8")
        publish(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(adapted, ignore_errors=True)
    return out


def _merge(
    recipe: dict[str, Any],
    located: Mapping[str, Located],
    folder: Path,
    adapted: Path,
    *,
    seed: int,
    device: str,
) -> None:
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    # The card is ours: mergekit's asks the hub whether each of the models is there.
    options = MergeOptions(quiet=True, device=device, write_model_card=False)
    with weights.loaders({}), weights.quiet_peft(), torch.random.fork_rng(devices=devices):
        table = {name: _reference(where, adapted) for name, where in located.items()}
        try:
            config = MergeConfiguration.model_validate(substitute(copy.deepcopy(recipe), table))
            torch.manual_seed(seed)
            run_merge(config, str(folder), options)
        except (
            Exception
        ) as error:  # mergekit raises RuntimeError, ValueError, TypeError, KeyError and pydantic's
            reason = " ".join(str(error).split())[:500]
            raise GenomeError(f"mergekit refused the recipe ({type(error).__name__}: {reason})") from error


def _reference(where: Located, adapted: Path) -> Any:
    """Return mergekit's reference to a model; one with an adapter is applied by mergekit and saved first."""
    from mergekit.common import ModelPath, ModelReference

    plain = plain_reference(where.folder)
    if where.adapter is None:
        return plain
    merged = ModelReference(model=plain.model, lora=ModelPath(path=str(where.adapter))).merged(str(adapted))
    # mergekit saves weights and configuration only, and wants to copy or build the tokenizer from there too.
    target = Path(merged.model.path)
    for file in where.folder.iterdir():
        if "safetensors" not in file.name and file.is_file() and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
    return merged


def _own_card(recipe: Mapping[str, Any], name: str, text: str) -> str:
    models = "\n".join(f"- `{model}`" for model in names(recipe))
    return _CARD.format(name=name, method=recipe.get("merge_method"), models=models, recipe=text)


def publish(folder: Path, out: Path) -> None:
    """Flush a folder to the disk and give it its name in one step."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in [*sorted(p for p in folder.rglob("*") if p.is_file()), folder]:
        _fsync(path)
    os.replace(folder, out)
    _fsync(out.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
