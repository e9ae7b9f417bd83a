"""Which modules of a model a setting of `target_modules` and `layers` means."""

from __future__ import annotations

import re
from typing import Any, final

from llmevo.errors import GenomeError
from llmevo.genome.train import TARGETS, TrainSettings

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
MLP = re.compile(r"mlp|feed_?forward|ffn|experts|moe|dense\w*dense|\.fc\d$", re.IGNORECASE)  # OPT's fc1, fc2
_LAYER = re.compile(r"\.(\d+)\.")


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """The linear modules inside the model's layers, by name, with their inputs and outputs."""
    import torch
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.named_modules():
        if not _LAYER.search(name):
            continue
        if isinstance(module, torch.nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's, with its weight transposed
            found[name] = (module.nx, module.nf)
    return found


def layer_of(name: str) -> int:
    """The number of the layer that a module is in."""
    match = _LAYER.search(name)
    assert match is not None
    return int(match[1])


def _is_in(name: str, part: str) -> bool:
    """Whether a module is in the `attn` or the `mlp` of its layer; in `all-linear` each is."""
    if part == "attn":
        return _ATTENTION.search(name.rpartition(".")[0]) is not None
    return part != "mlp" or MLP.search(name) is not None


def _stack_of(name: str) -> str:
    """What comes before the layer's number: an encoder's layers and a decoder's have numbers of their own."""
    return _LAYER.split(name, maxsplit=1)[0]


def _task_type(model: Any) -> str:
    if model.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM"


@final
class Targets:
    """Which modules of a model a setting of `target_modules` and `layers` means.

    Args:
        model: A transformers model without adapters.

    Attributes:
        layers: How many there are; of an encoder and a decoder, those of the deeper one.
        transposed: Whether the modules hold their weights transposed, as GPT-2's do.
        task_type: What peft calls what the model does.
        nested: Whether layers hold numbered parts, as T5's do, which peft takes for the layers.

    Raises:
        GenomeError: It has no linear modules in numbered layers.
    """

    def __init__(self, model: Any) -> None:
        self._linear = linear_layers(model)
        if not self._linear:
            raise GenomeError(
                "`train` needs a model with linear modules in numbered layers, and it has none."
            )
        self._depth: dict[str, int] = {}
        for name in self._linear:
            stack = _stack_of(name)
            self._depth[stack] = max(self._depth.get(stack, 0), 1 + layer_of(name))
        self.layers = max(self._depth.values())
        self.task_type = _task_type(model)
        self.nested = any(len(_LAYER.findall(name)) > 1 for name in self._linear)
        kinds = {type(model.get_submodule(name)).__name__ for name in self._linear}
        self.transposed = kinds == {"Conv1D"}

    def modules(self, settings: TrainSettings) -> dict[str, tuple[int, int]]:
        """The modules by full name, with their inputs and outputs.

        Raises:
            GenomeError: Nothing matches, or there are fewer layers than asked for.
        """
        if settings.layers is not None and settings.layers > self.layers:
            raise GenomeError(
                f"`train.layers` must be <= {self.layers}, the model's layers, but may be "
                f"{settings.layers}; lower it."
            )
        last = settings.layers or self.layers
        names = self._of_kind(settings.target_modules)
        return {
            name: self._linear[name]
            for name in names
            if layer_of(name) >= self._depth[_stack_of(name)] - last
        }

    def suffixes(self, settings: TrainSettings) -> list[str]:
        """The shortest ends of module names that mean the targets in all layers and nothing else."""
        chosen = set(self._of_kind(settings.target_modules))
        found = set()
        for name in chosen:
            parts = name.split(".")
            for count in range(1, len(parts) + 1):
                end = ".".join(parts[-count:])
                if all(other in chosen for other in self._linear if f".{other}".endswith(f".{end}")):
                    found.add(end)
                    break
        return sorted(found)

    def _of_kind(self, target: str | tuple[str, ...]) -> list[str]:
        if isinstance(target, str):
            names = [name for name in self._linear if _is_in(name, target)]
            missing = [] if names else [target]
        else:
            ends = tuple(f".{end}" for end in target)
            names = [name for name in self._linear if f".{name}".endswith(ends)]
            missing = [end for end in target if not any(f".{n}".endswith(f".{end}") for n in self._linear)]
        if missing:
            known = sorted({name.rpartition(".")[2] for name in self._linear})
            raise GenomeError(
                f"`train.target_modules` must match linear modules of the model, but {missing[0]!r} matches "
                f"none; name some of {', '.join(known)}, or one of {', '.join(TARGETS)}."
            )
        return names
