"""Heads that say a class or a value: the loss and what is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np
import numpy.typing as npt

from llmevo.errors import GenomeError
from llmevo.train.example import Example
from llmevo.train.seq2seq import encoder_inputs

if TYPE_CHECKING:
    import torch

_HEAD = "score"  # what transformers calls it on every model that was made to continue texts


def fit_head(model: Any, labels: Sequence[str | int], seed: int) -> None:
    """Give a model for sequence classification an output for each label, or one for a value.

    A head that has them already keeps its weights; another is drawn anew, in float32, in which it is trained
    whatever the rest is computed in.

    Args:
        model: A transformers model for sequence classification.
        labels: The classes; empty for a value.
        seed: Of the new head. torch's random state is left as it was.

    Raises:
        GenomeError: The model is none, or has a head of another build.
    """
    import torch

    classes = len(labels) or 1
    head = getattr(model, _HEAD, None)
    if not isinstance(head, torch.nn.Linear):
        raise GenomeError(
            f"`train.head` needs a model that transformers classifies with by one linear layer `{_HEAD}`, as "
            f"Llama's and GPT-2's kin, but got {type(model).__name__}; take another model."
        )
    if head.out_features != classes:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weight = torch.empty(classes, head.in_features)
            weight.normal_(std=getattr(model.config, "initializer_range", 0.02))
        fresh = torch.nn.Linear(head.in_features, classes, bias=head.bias is not None, device="meta")
        fresh.weight = torch.nn.Parameter(weight.to(head.weight.device), requires_grad=False)
        if head.bias is not None:
            zeros = torch.zeros(classes, device=head.weight.device)
            fresh.bias = torch.nn.Parameter(zeros, requires_grad=False)
        setattr(model, _HEAD, fresh)
        model.num_labels = classes
    for name, value in head_options(labels).items():
        setattr(model.config, name, value)
    fresh = getattr(model, _HEAD).float()
    if model.dtype != torch.float32:
        fresh.register_forward_pre_hook(_to_float32)


def head_options(labels: Sequence[str | int]) -> dict[str, Any]:
    """What a classifying model's configuration says of these labels; of a value, if there are none."""
    names = {number: str(label) for number, label in enumerate(labels or ["value"])}
    problem = "single_label_classification" if labels else "regression"
    return {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
        "problem_type": problem,
    }


def _to_float32(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].float(), *inputs[1:])


@final
class HeadForward:
    """The forward pass of a resident model with a head for classes or a value.

    Args:
        model: For sequence classification, after `fit_head`.
        filler: The token that pads rows. transformers reads the last token that is another one.

    Attributes:
        packed: Never: the head reads the last token of a row.
        partial: Never: transformers computes the head by itself.
    """

    packed = False
    partial = False

    def __init__(self, model: Any, filler: int) -> None:
        self._model, self._filler = model, filler
        model.config.get_text_config().pad_token_id = filler

    def losses(self, examples: Sequence[Example]) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        """The negative log-likelihood of each class, or the squared error of each value; see `Losses`."""
        import torch

        owners = np.flatnonzero([len(example) > example.border for example in examples])
        asked = [examples[int(index)] for index in owners]
        found = self.outputs(asked)
        if found.shape[1] == 1:
            wanted = torch.tensor([example.value for example in asked], device=found.device)
            return (found[:, 0] - wanted) ** 2, owners
        labels = torch.tensor([int(example.tokens[-1]) for example in asked], device=found.device)
        return torch.nn.functional.cross_entropy(found, labels, reduction="none"), owners

    def outputs(self, examples: Sequence[Example]) -> torch.Tensor:
        """The head's outputs, float32, shape (examples, classes or 1)."""
        logits: torch.Tensor = self._model(
            **encoder_inputs(examples, self._model.device, self._filler), use_cache=False
        ).logits
        return logits.float()
