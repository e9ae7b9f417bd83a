"""The tasks that are no lm-eval tasks: measured on the examples of `train.data` that were not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, final

VALIDATION_LOSS = "validation_loss"
"""The mean over the examples of their mean loss per learnt token."""

GENERAL_LOSS = "general_loss"
"""The same of `train.data.general`: what the model could do before, and may forget."""

NLL = "nll,none"
"""Their one metric, in nats; with a head for values the mean squared error."""

_Part: TypeAlias = Literal["validation", "test", "general", "general_test"]
_LM = ("lm",)
_CLASSES = ("classification",)
_VALUES = ("regression",)


@final
@dataclass(frozen=True, slots=True)
class OwnTask:
    """What a genome needs to know of one.

    Args:
        metric: Its one metric, as `name,filter`.
        heads: The settings of `train.head` that it is for.
        more_is_better: Whether the search should raise it.
        generates: Whether the model has to answer the examples' prompts.
        parts: Of the examples, for the search and for the held-out table.
    """

    metric: str
    heads: tuple[str, ...]
    more_is_better: bool = True
    generates: bool = False
    parts: tuple[_Part, _Part] = ("validation", "test")


OWN_TASKS = {
    VALIDATION_LOSS: OwnTask(NLL, (*_LM, *_CLASSES, *_VALUES), more_is_better=False),
    GENERAL_LOSS: OwnTask(NLL, _LM, more_is_better=False, parts=("general", "general_test")),
    "perplexity": OwnTask("perplexity,none", _LM, more_is_better=False),
    "bits_per_byte": OwnTask("bits_per_byte,none", _LM, more_is_better=False),
    "accuracy": OwnTask("accuracy,none", _CLASSES),
    "matthews": OwnTask("matthews,none", _CLASSES),
    "f1": OwnTask("f1,none", _CLASSES),
    "pearson": OwnTask("pearson,none", _VALUES),
    "spearman": OwnTask("spearman,none", _VALUES),
    **{
        name: OwnTask(f"{name},none", _LM, generates=True)
        for name in ("exact_match", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf")
    },
}
"""By the name under which `tasks` has them."""
