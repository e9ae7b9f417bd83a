"""What may be wrong with a training, found before its first step: the model, the data, the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from llmevo.errors import GenomeError
from llmevo.genome.own import OWN_TASKS
from llmevo.genome.sections import HalvingSpec
from llmevo.genome.train import TrainSpec, values_of
from llmevo.train import data, methods
from llmevo.train.data import Examples
from llmevo.train.shares import TOKENS, shares_of
from llmevo.train.targets import Targets
from llmevo.train.tokenise import Kind


@final
@dataclass(frozen=True, slots=True)
class Prepared:
    """What a training is made from, checked.

    Args:
        kind: Of model.
        targets: The modules that adapters may wrap.
        context: Most tokens that the model takes.
        data: The examples.
        shares: Of the tokens, at which the rungs below the last end; empty where each training is a whole.
        undivided: Why there are no shares; empty where there are some, or none are wanted.
    """

    kind: Kind
    targets: Targets
    context: int
    data: Examples
    shares: tuple[float, ...]
    undivided: str


def prepare(
    spec: TrainSpec,
    model: Any,
    tokenizer: Any,
    *,
    seed: int,
    metrics: Sequence[str],
    halving: HalvingSpec,
    tokens: str = TOKENS,
) -> Prepared:
    """Read the examples, and check them and all that the genes may choose against the model.

    Args:
        spec: The section `train` of the genome.
        model: A transformers model; no weight is read, so its tensors may be torch's `meta` ones.
        tokenizer: The model's tokenizer.
        seed: The run's, which the split follows.
        metrics: Which of `OWN_TASKS` are measured.
        halving: Where trainings stop to be compared.
        tokens: What the user calls the budget; an option's name where there is no genome.

    Raises:
        GenomeError: The data, the model or a hyperparameter does not fit.
    """
    if any(values_of(spec.checkpointing)) and not model.supports_gradient_checkpointing:
        raise GenomeError(
            f"`train.checkpointing` must be false: {type(model).__name__} cannot recompute activations."
        )
    kind = _kind(spec, model)
    targets = Targets(model)
    methods.check(spec, targets)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    examples = data.load(spec.data, tokenizer, context, seed, kind)
    _check_batches(spec, len(examples.parts["train"]), tokens)
    shares, undivided = shares_of(spec, halving, examples.parts["train"], seed, tokens)
    _check_metrics(metrics, examples)
    return Prepared(kind, targets, context, examples, shares, undivided)


def _kind(spec: TrainSpec, model: Any) -> Kind:
    if spec.head != "lm":
        return spec.head
    if model.config.is_encoder_decoder:
        return "seq2seq"
    seen = {part.is_causal for part in model.modules() if isinstance(getattr(part, "is_causal", None), bool)}
    if seen == {False}:
        raise GenomeError(
            f"`train` needs a model whose tokens see only those before them, but those of "
            f"{type(model).__name__} see all, so that it would learn to copy; take a model that goes on with "
            "a text."
        )
    return "causal"


def _check_batches(spec: TrainSpec, count: int, tokens: str) -> None:
    largest = max(values_of(spec.batch_size))
    if largest <= count:
        return
    if tokens != TOKENS:
        raise GenomeError(
            f"`train.data` must have >= {largest} training examples, a step's, but has {count}; "
            "add examples, or hold out fewer."
        )
    raise GenomeError(
        f"`train.batch_size` must be <= the number of training examples, {count}, but may be "
        f"{largest}; lower it, or add examples."
    )


def _check_metrics(names: Sequence[str], examples: Examples) -> None:
    asking = [name for name in names if OWN_TASKS[name].generates]
    asked = [e for part in ("validation", "test") for e in examples.parts[part]]
    if asking and not all(e.text is not None and len(e.text.prompt) for e in asked):
        raise GenomeError(
            f"`tasks` names {asking[0]}, for which every example must have something to answer; give "
            "`prompt` and `completion`, or `messages`, or remove the task."
        )
