"""Attention over flat tokens, as a backend of transformers.

transformers hands each layer's queries, keys and values to a function that the model's configuration names.
Ours asks what knows which token sees which; everything else about the model stays transformers' own code.

Imported only where torch and transformers are in use already.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, PreTrainedModel

NAME = "llmevo_packed"
_current: ContextVar[Attends] = ContextVar("layout")
_UNKNOWN = ("softcap", "s_aux", "position_bias")  # what an attention may ask for that is not done here
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
_MOVING_ROTATIONS = ("dynamic", "longrope")


class NotPackable(Exception):
    """This model's attention cannot be computed on packed tokens; the message says why."""


class Attends(Protocol):
    """What computes the attention of flat tokens."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Attention of one layer, `[tokens, heads, width]` each and back."""
        ...

    def check(self, options: dict[str, Any]) -> None:
        """Raise NotPackable if a layer asks for what is not done here."""
        ...


def refuse(options: dict[str, Any], longest: int) -> None:
    """Raise NotPackable for attention that is more than each token's to those before it in its sequence.

    Args:
        options: What transformers passes to a layer's attention beside queries, keys and values.
        longest: Tokens of the longest sequence.
    """
    window = options.get("sliding_window")
    if window is not None and window < longest:
        raise NotPackable(f"a sliding window of {window} tokens is shorter than a request")
    for name in _UNKNOWN:
        if options.get(name) is not None:
            raise NotPackable(f"its attention uses `{name}`")


def refuse_model(model: PreTrainedModel) -> None:
    """Raise NotPackable where the configuration says that tokens depend on more than those that they see."""
    config = model.config
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise NotPackable("it is an encoder and a decoder")
    odd = sorted(set(getattr(text, "layer_types", None) or ()) - _PLAIN_LAYERS)
    if odd:
        raise NotPackable(f"it has layers of type {', '.join(odd)}")
    rotation = getattr(text, "rope_parameters", None) or {}
    kinds = [
        rotation.get("rope_type"),
        *(r.get("rope_type") for r in rotation.values() if isinstance(r, dict)),
    ]
    for kind in kinds:
        if kind in _MOVING_ROTATIONS:
            raise NotPackable(f"its positions ({kind}) depend on the longest request in a batch")
    with packed_attention(model):
        pass


def narrowest_window(model: PreTrainedModel) -> float:
    """Tokens of the narrowest sliding window; infinity without one."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    return (getattr(text, "sliding_window", None) or math.inf) if slides else math.inf


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer, with `[1, heads, tokens, width]` each."""
    layout = _current.get()
    layout.check(options)
    if len(query) != 1 or not getattr(module, "is_causal", True) or dropout:
        raise NotPackable("its attention is not that of a decoder over one batch of tokens")
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return layout.attend(id(module), queries, keys, values, scaling).unsqueeze(0), None


AttentionInterface.register(NAME, _forward)


@contextlib.contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, `model` attends by `_forward`.

    Raises:
        NotPackable: The model does not leave its attention to a function.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    configs = {id(part.config): part.config for part in parts}
    if not all(part._can_set_attn_implementation() for part in parts):
        raise NotPackable("its attention is not pluggable")
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


@contextlib.contextmanager
def laid_out(layout: Attends) -> Iterator[None]:
    """Within the block, attention follows `layout`."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)
