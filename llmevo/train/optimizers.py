"""The optimizer of a training, and its state as tensors.

AdamW, with a learning rate of its own for LoRA+'s B; for QLoRA the 8-bit one of bitsandbytes, paged where
there is a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmevo.genome.train import TrainSettings
from llmevo.train import nf4

if TYPE_CHECKING:
    import torch

_SHARED = ("qmap1", "qmap2")  # bitsandbytes' code books: constants that all parameters share


def make(parameters: Mapping[str, torch.nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer of the parameters of one adapter, by name."""
    import torch

    groups: list[dict[str, Any]] = [{"params": list(parameters.values()), "scale": 1.0}]
    if settings.adapter == "loraplus":  # elsewhere one group, which is one call of the fused kernels
        groups = [
            {"params": [p], "scale": settings.loraplus_ratio if ".lora_B" in name else 1.0}
            for name, p in parameters.items()
        ]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.adapter != "qlora":
        return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=True)
    from bitsandbytes.optim import PagedAdamW8bit

    made: torch.optim.Optimizer = PagedAdamW8bit(groups, lr=rate, weight_decay=decay)
    return made


def step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Take a step at a learning rate; the gradients stay."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    with nf4.not_paged():
        optimizer.step()


def state_of(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Moments and counts, `exp_avg/NAME` and so on."""
    import torch

    return {
        f"{key}/{name}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if key not in _SHARED
    }


def resume(
    optimizer: Any, parameters: Mapping[str, torch.nn.Parameter], state: Mapping[str, torch.Tensor]
) -> None:
    """Go on from what `state_of` returned."""
    import torch

    saved: dict[str, dict[str, torch.Tensor]] = {}
    for path, tensor in state.items():
        key, _, name = path.partition("/")
        saved.setdefault(name, {})[key] = tensor
    if isinstance(optimizer, torch.optim.AdamW):
        for name, tensors in saved.items():
            device = parameters[name].device
            optimizer.state[parameters[name]] = {key: tensor.to(device) for key, tensor in tensors.items()}
        return
    (group,) = optimizer.param_groups
    places = {parameter: index for index, parameter in enumerate(group["params"])}
    for name, tensors in saved.items():
        parameter = parameters[name]
        with nf4.not_paged():
            optimizer.init_state(group, parameter, 0, places[parameter])
        known = optimizer.state[parameter]
        known["step"] = int(tensors.pop("step"))
        for key, tensor in tensors.items():
            known[key].copy_(tensor)
