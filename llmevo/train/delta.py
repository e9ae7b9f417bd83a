"""Delta-LoRA: the base weights take a share of each change of the adapter's product.

Zi et al., Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices, arXiv 2309.02411,
Algorithm 1: after K steps of LoRA, each step adds `lambda * alpha / r * (B' A' - B A)` to the weights, B' A'
being the product after it. The sum telescopes: the weights are those at the start plus
`lambda * alpha / r * (B A - B_K A_K)`. They are computed so, in float32 and rounded once, where steps of 1e-6
added to bfloat16 would be lost one by one.

So the trained model is the base with a LoRA of twice the rank, and is saved as that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

from llmevo.genome.train import TrainSettings

if TYPE_CHECKING:
    import torch


@final
class Delta:
    """The moving weights below one adapter.

    Whoever put the adapter on puts the old weights back: what moves is a copy.

    Args:
        layers: peft's LoRA layers by name, in the model that the adapter is on.
        name: The adapter's name in them.
        settings: `delta_lambda` and `delta_start`.

    Attributes:
        first: The factors A_K and B_K, by the name of their layer and `lora_A` or `lora_B`; empty before.
    """

    def __init__(self, layers: dict[str, Any], name: str, settings: TrainSettings) -> None:
        self._layers, self._name, self._settings = layers, name, settings
        self._base: dict[str, torch.Tensor] = {}
        self.first: dict[str, torch.Tensor] = {}

    def stepped(self, step: int, steps: int) -> None:
        """Move the weights after optimizer step `step` of 0 to `steps - 1`."""
        start = math.floor(self._settings.delta_start * steps)
        if step == start:
            self.first = {key: factor.detach().clone() for key, factor in self._factors().items()}
        elif step > start:
            self._move()

    def resume(self, first: dict[str, torch.Tensor]) -> None:
        """Go on from factors that `first` had, with the adapter as it was then."""
        now = self._factors()
        self.first = {key: factor.to(now[key].device) for key, factor in first.items()}
        if first:
            self._move()

    def _factors(self) -> dict[str, torch.Tensor]:
        return {
            f"{key}.{side}": getattr(layer, side)[self._name].weight
            for key, layer in self._layers.items()
            for side in ("lora_A", "lora_B")
        }

    def _move(self) -> None:
        import torch

        now = self._factors()
        with torch.no_grad():
            for key, layer in self._layers.items():
                weight = layer.get_base_layer().weight
                if key not in self._base:
                    self._base[key] = weight.data
                    weight.data = torch.empty_like(weight.data)
                down = torch.cat([now[f"{key}.lora_A"], self.first[f"{key}.lora_A"]])
                up = torch.cat([now[f"{key}.lora_B"], -self.first[f"{key}.lora_B"]], dim=1)
                if layer.fan_in_fan_out:
                    up, down = down.T, up.T
                scale = self._settings.delta_lambda * layer.scaling[self._name]
                weight.data.copy_(torch.addmm(self._base[key].float(), up, down, alpha=scale))
