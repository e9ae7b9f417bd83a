"""Weighted sums of adapters, so that merging adapters gives what merging their models gives.

peft's `add_weighted_adapter(combination_type="linear")` sums A and B apart, which is another function: it has
the cross terms B1 A2 and B2 A1, and not the weights. Here the products are summed.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from llmevo.errors import GenomeError
from llmevo.train.products import Product, truncated, weighted_sum

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_SIDES = (".lora_A.weight", ".lora_B.weight")
# What a LoRA may have beside BA. Sums of it are not what these settings say, or are not linear in BA.
_BESIDE = {"use_dora": "DoRA's magnitudes", "lora_bias": "biases", "modules_to_save": "whole modules"}


@final
@dataclass(frozen=True, slots=True)
class Combined:
    """What a sum of adapters came to.

    Args:
        ranks: By module.
        lost: By module, the norm of what was cut off over that of the sum; 0 for an exact sum.
    """

    ranks: dict[str, int]
    lost: dict[str, float]


def read(folder: Path) -> tuple[dict[str, Product], Any]:
    """What a saved LoRA adds to each module's weights, and its configuration.

    Args:
        folder: As peft writes it, with safetensors.

    Returns:
        Products by the module's name in the model, float32 on the CPU, with the scale (of `alpha_pattern`,
        `rank_pattern` and rsLoRA too) in `up`; and the `LoraConfig`.

    Raises:
        GenomeError: It cannot be read, or is no product alone (DoRA, VeRA, IA3, biases, whole modules).
    """
    import torch
    from peft import LoraConfig, PeftConfig
    from peft.utils.other import get_pattern_key
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise GenomeError(
                f"`{folder}` must be a peft adapter with {CONFIG} and {WEIGHTS}; it lacks {file}."
            )
    try:
        config = PeftConfig.from_pretrained(str(folder))
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise GenomeError(f"`{folder}` cannot be read as a peft adapter: {reason}.") from None
    if not isinstance(config, LoraConfig):
        kind = type(config).__name__.removesuffix("Config")
        raise GenomeError(f"`{folder}` must be a LoRA, whose change of the weights is BA, but is {kind}.")
    beside = [what for key, what in _BESIDE.items() if getattr(config, key, None)]
    if beside:
        raise GenomeError(
            f"`{folder}` must hold products BA alone, but has {beside[0]}; it cannot be summed."
        )
    found = {}
    for name, (down, up) in _pairs(folder, state).items():
        rank = len(down)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        found[name] = Product(scale * up.to(torch.float32), down.to(torch.float32))
    return found, config


def _pairs(folder: Path, state: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B by module."""
    found = {}
    for key, tensor in state.items():
        side = next((side for side in _SIDES if key.endswith(side)), None)
        if side is None or tensor.ndim != 2 or not key.startswith(PREFIX):
            raise GenomeError(f"`{folder}` must hold A and B of linear modules alone, but has {key!r}.")
        stem = key.removesuffix(side)
        if side == _SIDES[0]:
            found[stem.removeprefix(PREFIX)] = (tensor, state[stem + _SIDES[1]])
    return found


def combine(
    folders: Sequence[Path], weights: Sequence[float], out: Path, *, rank: int | None = None
) -> Combined:
    """Write the weighted sum of adapters of one base model as an adapter that plain peft loads.

    The base with it is `base + sum of weight * change`: where the weights sum to 1, the linear merge of the
    models that the adapters make.

    Args:
        folders: Of LoRAs, of whatever ranks, scales and modules.
        weights: One for each; may be negative and need not sum to 1.
        out: A folder that is not there yet.
        rank: Of the sum in each module, which is then the nearest matrix of that rank. None for the exact
            sum, whose rank is the sum of the ranks, or what the module's shape allows.

    Raises:
        GenomeError: An argument is wrong, an adapter is no LoRA, or they do not belong on one model.
    """
    _check(folders, weights, out, rank)
    adapters = [read(folder) for folder in folders]
    names = sorted({name for products, _ in adapters for name in products})
    sums, lost = {}, {}
    for name in names:
        terms = [
            (w, products[name])
            for w, (products, _) in zip(weights, adapters, strict=True)
            if name in products
        ]
        shapes = {product.shape for _, product in terms}
        if len(shapes) > 1:
            raise GenomeError(
                f"the adapters must belong on one model, but `{name}` has the shapes {sorted(shapes)}."
            )
        whole = weighted_sum(terms)
        limit = min(*whole.shape, rank or whole.rank)
        # A concatenation is exact to the bit; anything else is rounded.
        sums[name], lost[name] = (whole, 0.0) if whole.rank <= limit else truncated(whole, limit)
    _write(sums, [config for _, config in adapters], out)
    return Combined({name: product.rank for name, product in sums.items()}, lost)


def _check(folders: Sequence[Path], weights: Sequence[float], out: Path, rank: int | None) -> None:
    if not folders or len(folders) != len(weights):
        raise GenomeError(
            f"`weights` must be one for each adapter, but there are {len(folders)} adapters and "
            f"{len(weights)} weights."
        )
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise GenomeError(f"`weights` must be finite and not all 0, but got {list(weights)}.")
    if rank is not None and rank < 1:
        raise GenomeError(f"`rank` must be >= 1, but got {rank}.")
    if out.exists():
        raise GenomeError(f"`out` must be a folder that is not there yet, but {out} is; choose another.")


def _write(sums: Mapping[str, Product], configs: Sequence[Any], out: Path) -> None:
    from collections import Counter

    from peft import LoraConfig
    from safetensors.torch import save_file

    first = configs[0]
    ranks = {name: product.rank for name, product in sums.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    written = LoraConfig(
        r=usual,
        lora_alpha=usual,  # the scale is 1: it is in B
        rank_pattern=others,
        alpha_pattern=others,  # without it peft would divide by the other rank
        target_modules=sorted(sums),
        fan_in_fan_out=first.fan_in_fan_out,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        inference_mode=True,
    )
    tensors = {}
    for name, product in sums.items():
        for side, factor in zip(_SIDES, (product.down, product.up), strict=True):
            tensors[PREFIX + name + side] = factor.contiguous()
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
        written.save_pretrained(str(beside))
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
