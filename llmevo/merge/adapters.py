"""Adapters as factors: `W + scale * up @ down` is not written out where only a sum of models is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from llmevo.merge import headers
from llmevo.merge.layout import Arena
from llmevo.merge.references import Located

if TYPE_CHECKING:
    import torch

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# Settings that say where a plain LoRA sits, how large it is and how it was trained. Any other that is not at
# peft's default makes it more than `scale * up @ down`.
_PLAIN = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "peft_type"),
    *("inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping"),
    *("runtime_config", "megatron_core", "qalora_group_size"),
}
# Initialisations that leave the base model's weights as they are.
_STARTS = (True, False, "gaussian", "orthogonal")
# Mean rank up to which factors are not much slower than the matrices that they stand for: each costs
# 2 x rank operations an element, a matrix 2 bytes.
_RANK = 32


@final
@dataclass(frozen=True, slots=True)
class Factor:
    """What an adapter adds to one matrix: `scale * up @ down`.

    Args:
        up: `[rows, rank]`, float32.
        down: `[rank, columns]`, float32.
        scale: Alpha over the rank, or over its root.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the adapted matrix, on the CPU: peft's operations in their order, so that its bits agree."""
        result = weight.detach().cpu().clone()
        result += (self.up.cpu() @ self.down.cpu()) * self.scale
        return result

    def delta(self) -> torch.Tensor:
        """Return the difference from the base, in float32 and not rounded."""
        return (self.up @ self.down) * self.scale


def kept(located: Mapping[str, Located], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Decide which adapters stay factors.

    Args:
        located: The models.
        dtype: Of the models in memory. Only an adapter whose base is stored in it stays factors, since it is
            added to the base as it is stored.

    Returns:
        The scales of each such model's tensors, by names. Empty where the mean rank is so high that matrices
        are much faster.
    """
    found = {}
    for name, where in located.items():
        if where.adapter is not None and headers.stored_in(where, dtype):
            scales = _scales(where)
            if scales is not None:
                found[name] = scales
    ranks = [rank for name in found for rank in _ranks(located[name]).values()]
    return found if ranks and sum(ranks) <= _RANK * len(ranks) else {}


def count_bytes(located: Located) -> int:
    """Return the bytes of an adapter's factors in float32."""
    return 4 * sum(shape[0] * shape[1] for shape in _shapes(located).values())


def load(
    located: Located, scales: Mapping[str, float], arena: Arena, device: torch.device
) -> dict[str, Factor]:
    """Load an adapter's factors into one buffer.

    Raises:
        GenomeError: If a factor is NaN or infinite.
    """
    import torch

    from llmevo.merge import weights

    assert located.adapter is not None
    stored = dict(weights.stored(located.adapter, "adapter_model", located.name))
    places = arena.allocate({key: tuple(t.shape) for key, t in stored.items()}, torch.float32, device)
    for key, place in places.items():
        weights.check_finite(stored[key], key, located.name)
        place.copy_(stored[key])
    modules = {_module(key): key for key in stored if key.endswith(_DOWN)}
    return {
        f"{module}.weight": Factor(
            places[key.removesuffix(_DOWN) + _UP], places[key], scales[f"{module}.weight"]
        )
        for module, key in modules.items()
    }


def _scales(located: Located) -> dict[str, float] | None:
    """Return what peft multiplies each product with, by tensor; None for anything but a plain LoRA."""
    import torch
    from mergekit.common import get_auto_cls
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear
    from transformers import AutoConfig

    from llmevo.merge.weights import quiet_peft

    assert located.adapter is not None
    settings = headers.read_json(located.adapter / "adapter_config.json", located.name)
    if not _is_plain(settings, LoraConfig().to_dict()) or not all(
        key.endswith((_DOWN, _UP)) for key in _shapes(located)
    ):
        return None
    architecture = headers.config(located)["architectures"][0]
    # peft itself says which modules are wrapped and with which scale, on a model without any weights.
    with quiet_peft(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(located.folder), trust_remote_code=False)
        model = get_auto_cls(architecture).from_config(config)
        try:
            lora = LoraConfig.from_pretrained(str(located.adapter))
            lora.init_lora_weights = False
            lora.base_model_name_or_path = None  # peft warns that it is another
            wrapped = get_peft_model(model, lora).base_model.model
        except (RuntimeError, ValueError, TypeError, KeyError, ImportError):
            return None  # it will be said when peft is asked to apply it
    found, ranks = {}, {}
    for name, module in wrapped.named_modules():
        if type(module) is Linear and type(module.base_layer) is torch.nn.Linear:
            found[name] = float(module.scaling["default"])
            ranks[name] = module.r["default"]
    # Factors of another rank than the file says, which would be scaled wrongly, are for peft to refuse.
    if ranks != {_module(key): rank for key, rank in _ranks(located).items()}:
        return None
    return {f"{name}.weight": scale for name, scale in found.items()}


def _is_plain(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    if settings.get("init_lora_weights", True) not in _STARTS:
        return False
    return all(
        key in _PLAIN or (key in defaults and value == defaults[key]) for key, value in settings.items()
    )


def _ranks(located: Located) -> dict[str, int]:
    return {key: shape[0] for key, shape in _shapes(located).items() if key.endswith(_DOWN)}


def _shapes(located: Located) -> dict[str, tuple[int, ...]]:
    assert located.adapter is not None
    tensors = headers.tensors(located.adapter, "adapter_model", located.name)
    return {key: tensor.shape for key, tensor in tensors.items()}


def _module(key: str) -> str:
    return key.split(".lora_")[0].removeprefix("base_model.model.")
