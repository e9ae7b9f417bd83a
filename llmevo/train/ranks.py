"""What AdaLoRA knows of its ranks, as tensors: peft keeps it beside the parameters, and a state needs it.

That is the smoothed importance of each entry of the factors, and which ranks were kept at the last cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # the names of peft's RankAllocator
_KEPT = "kept"


def of(tuner: Any, name: str) -> dict[str, torch.Tensor]:
    """The importances as `kind/parameter`, and which ranks of a layer are kept as `kept/layer`.

    Args:
        tuner: peft's AdaLoraModel.
        name: The adapter's name.
    """
    import torch

    allocator = tuner.rankallocator
    tensors = {
        f"{kind}/{parameter}": tensor
        for kind in _KINDS
        for parameter, tensor in getattr(allocator, kind).items()
    }
    kept: dict[str, list[bool]] = tuner.peft_config[name].rank_pattern or {}
    return tensors | {f"{_KEPT}/{layer}": torch.tensor(ranks) for layer, ranks in kept.items()}


def restore(tuner: Any, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `of` gave."""
    allocator = tuner.rankallocator
    allocator.reset_ipt()
    devices = {parameter: tensor.device for parameter, tensor in tuner.model.named_parameters()}
    kept = {}
    for key, tensor in tensors.items():
        kind, _, parameter = key.partition("/")
        if kind == _KEPT:
            kept[parameter] = tensor.tolist()
        else:
            getattr(allocator, kind)[parameter] = tensor.to(devices[parameter])
    tuner.peft_config[name].rank_pattern = kept or None
