"""The train stage: examples prepared once, candidates trained one after the other on one resident model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final

from llmevo.errors import GenomeError, StageError
from llmevo.genome.own import OWN_TASKS, VALIDATION_LOSS
from llmevo.genome.sections import HalvingSpec
from llmevo.genome.train import TrainSettings, TrainSpec, values_of
from llmevo.space import Params
from llmevo.train import adapters, check, methods, nf4
from llmevo.train.classify import HeadForward, fit_head
from llmevo.train.data import Part
from llmevo.train.forward import Forward, Losses
from llmevo.train.generate import filler
from llmevo.train.inherit import Start, fingerprint, inherit
from llmevo.train.loop import Step, Training, mean_of_late, order, plan, tokens_of, within
from llmevo.train.measure import Judge, sums
from llmevo.train.metrics import Measured
from llmevo.train.seq2seq import PairForward
from llmevo.train.shares import TOKENS
from llmevo.train.tokenise import Kind
from llmevo.trial import Split

RECORD = "training.json"
_HALVING = HalvingSpec()


@final
@dataclass(frozen=True, slots=True)
class Trained:
    """What a training came to.

    Args:
        metrics: `loss_first` and `loss_last` (nats per target token), `steps`, `tokens`, `budget` (the tokens
            of the whole training), `parameters` (trained ones).
        bytes: Of the adapter's weights; 0 while the training is not over.
        sketch: Of the adapter's change, by place; empty where nobody asked for it.
        epochs: With `each_epoch`, what was measured after each: `epochs` that were done, and the values of
            the metrics by name.
    """

    metrics: dict[str, float]
    bytes: int
    sketch: dict[str, float] = field(default_factory=dict)
    epochs: tuple[dict[str, float], ...] = ()


@final
class Trainer:
    """Trains candidates on the resident model.

    Args:
        spec: The section `train` of the genome.
        model: The resident model: causal, for sequence-to-sequence, or with a head for classes as `spec.head`
            says, which is fitted to the data's. Its parameters are never replaced; adapters wrap its modules
            while a candidate is trained and evaluated.
        tokenizer: The model's tokenizer.
        seed: The run's: of the split, the order of the examples, the adapters' first weights, dropout.
        metrics: Which of `OWN_TASKS` are measured after each epoch, and may be asked of `measure`.
        halving: Where trainings stop to be compared.
        tokens: What the user calls the budget in tokens, for errors.

    Attributes:
        shares: Of the tokens, at which the rungs below the last end; empty where each training is a whole.
        reached: How many tokens the latest candidate was trained on when its training ended or failed.

    Raises:
        GenomeError: The data, the model or a hyperparameter does not fit; before any training.
    """

    def __init__(
        self,
        spec: TrainSpec,
        model: Any,
        tokenizer: Any,
        *,
        seed: int,
        metrics: Sequence[str] = (VALIDATION_LOSS,),
        halving: HalvingSpec = _HALVING,
        tokens: str = TOKENS,
    ) -> None:
        self._spec, self._model, self._seed = spec, model, seed
        found = check.prepare(
            spec, model, tokenizer, seed=seed, metrics=metrics, halving=halving, tokens=tokens
        )
        self._targets, self._data = found.targets, found.data
        self.shares, self._undivided = found.shares, found.undivided
        self.reached = 0
        self._forward = self._make_forward(found.kind, tokenizer)
        self._metrics = tuple(metrics)
        self._judge = Judge(self._forward, model, tokenizer, self._data, found.context, spec.max_new_tokens)
        self._facts = self._data.describe()

    @cached_property
    def _together(self) -> tuple[int, str]:
        """How many candidates to train at once, and why; it may be measured, so only when it is asked for."""
        from llmevo.train.pays import how_many

        if not isinstance(self._forward, Forward):
            return 1, "a head, or an encoder and a decoder, is trained alone"
        if self._spec.each_epoch:
            return 1, "what is measured after each epoch is trained alone"
        part = self._data.parts["train"]
        return how_many(self._spec, self._model, self._forward, self._targets, part, self._seed)

    def _make_forward(self, kind: Kind, tokenizer: Any) -> Losses:
        if kind == "causal":
            parts = self._data.parts
            first = [parts["train"][index] for index in order(len(parts["train"]), self._seed)]
            others = [example for part in parts if part != "train" for example in parts[part]]
            # Without a choice of layers adapters are in all of them.
            few = any(value is not None for value in values_of(self._spec.layers))
            return Forward(self._model, parts["train"], [*first, *others] if few else ())
        if kind == "seq2seq":
            return PairForward(self._model)
        fit_head(self._model, self._data.labels, self._seed)
        return HeadForward(self._model, filler(tokenizer))

    def settings(self, params: Params) -> TrainSettings:
        """The hyperparameters at a point of the space."""
        return self._spec.settings(params)

    def describe(self) -> dict[str, Any]:
        """Facts for the run's record, as JSON: the examples, and how the model is computed."""
        facts = {**self._facts, "packed": self._forward.packed, "head_at_targets": self._forward.partial}
        if "qlora" in values_of(self._spec.adapter):
            held = [self._model.get_submodule(name).weight.numel() for name in nf4.modules(self._model)]
            sizes = list(map(nf4.size, held))
            facts["nf4"] = {"bytes": sum(sizes), "paged": self._model.device.type == "cuda"}
        prefix = self._forward.prefix if isinstance(self._forward, Forward) else None
        if prefix is not None:
            facts["prefix"] = {"tokens": prefix.tokens, "bytes": prefix.bytes, "training": prefix.still}
        together, why = self._together
        return {**facts, "undivided": self._undivided, "together": together, "together_why": why}

    @contextmanager
    def candidate(
        self,
        settings: TrainSettings,
        number: int,
        base: str,
        folder: Path | None = None,
        rung: int | None = None,
        start: Start | None = None,
        tick: Callable[[int], None] | None = None,
        seed: int | None = None,
    ) -> Iterator[Trained]:
        """Train a candidate; it is on the model inside the `with` block, and gone after it.

        Args:
            settings: The hyperparameters.
            number: The trial's number.
            base: What the resident weights are: two trainings of equal `base` and settings are one.
            folder: Where the trained adapter is kept; one that is there already is not trained again. None
                to keep nothing. A training that stops leaves its state beside it, and goes on from there.
            rung: Stop at `shares[rung]` of the tokens; None for the whole training.
            start: What the candidate inherits, if it is of a population.
            tick: Called after each step with its number.
            seed: Of the adapter's first weights, the order of the examples and dropout; None for the run's.

        Raises:
            StageError: The training diverged, the settings do not fit the model, or a parent is gone.
        """
        seed = self._seed if seed is None else seed
        name, key = f"cand{number:04d}", self._key(settings, base, seed, start)
        known = None if folder is None or rung is not None else _record(folder, key)
        if folder is not None and known is not None:
            self.reached = int(known.metrics["tokens"])
            with adapters.loaded(self._model, folder, name, settings), self._above():
                yield known
            return
        examples = self._data.parts["train"]
        drawn = seed if start is None else start.order(seed)
        steps = plan(examples, settings, drawn)
        end = len(steps) if rung is None else within(steps, self.shares[rung])
        try:
            config = methods.config(settings, self._targets, seed, len(steps))
        except GenomeError as error:
            raise StageError("train", str(error)) from None
        with adapters.adapted(self._model, settings, config, name, seed) as adapter, self._above():
            if start is not None:
                inherit(adapter, start)
            training = Training(self._forward, adapter, examples, settings, drawn, steps)
            told = self._history(training, steps, tick) if self._spec.each_epoch else tick
            state = None if folder is None else _state(folder, key)
            try:
                training.run(self._model, state, told, until=end)
            finally:
                self.reached = tokens_of(steps[: len(training.losses)])
            trained = self._trained(adapter, training, steps, end, start, over=rung is None)
            if folder is not None and rung is None:
                facts = {"labels": self._data.labels, "chat": self._data.chat}
                record = {"key": key, "settings": asdict(settings), **facts, **asdict(trained)}
                _keep(adapter, folder, record)
            yield trained

    def _trained(
        self,
        adapter: adapters.Adapter,
        training: Training,
        steps: Sequence[Step],
        end: int,
        start: Start | None,
        *,
        over: bool,
    ) -> Trained:
        """What is said of a training after `end` of its `steps`, and whether it is over with them."""
        parameters = adapter.parameters().values()
        return Trained(
            {
                "loss_first": training.losses[0],
                "loss_last": mean_of_late(training.losses),
                "steps": float(end),
                "tokens": float(self.reached),
                "budget": float(tokens_of(steps)),
                "parameters": float(sum(p.numel() for p in parameters)),
            },
            sum(p.numel() * p.element_size() for p in parameters) if over else 0,
            {} if start is None else fingerprint(adapter, self._seed),
            tuple(training.history),
        )

    def _above(self) -> AbstractContextManager[None]:
        return self._forward.above() if isinstance(self._forward, Forward) else nullcontext()

    def ahead(self, chosen: Sequence[tuple[TrainSettings, int, Path, int | None]], base: str) -> int:
        """Train candidates together that `candidate` is asked for next, which then finds their states.

        One that cannot be trained with others, or fails, is left for `candidate` to train alone.

        Args:
            chosen: Settings, number, folder and rung of each, as for `candidate`.
            base: What the resident weights are.

        Returns:
            How many were trained together.
        """
        from llmevo.train.ahead import Ahead, train_ahead

        if not isinstance(self._forward, Forward) or self._spec.each_epoch:
            return 0
        asked = []
        for settings, number, folder, rung in chosen:
            key = self._key(settings, base, self._seed, None)
            if rung is None and _record(folder, key) is not None:
                continue
            steps = plan(self._data.parts["train"], settings, self._seed)
            end = len(steps) if rung is None else within(steps, self.shares[rung])
            asked.append(Ahead(settings, f"cand{number:04d}", steps, end, _state(folder, key)))
        part = self._data.parts["train"]
        return train_ahead(self._model, self._forward, self._targets, part, self._seed, asked)

    def _key(self, settings: TrainSettings, base: str, seed: int, start: Start | None) -> str:
        content = json.dumps([base, asdict(settings), seed, self._facts["fingerprint"]])
        if start is not None:
            # By their names: a parent may be deleted before its child is scored on the held-out items.
            parents = [[folder.name, weight] for folder, weight in start.parents]
            content += json.dumps([parents, start.noise, start.seed, start.generation])
        return hashlib.sha256(content.encode()).hexdigest()

    def losses(self, part: Part) -> list[float]:
        """The mean loss per target token of each example, in stored order.

        Raises:
            StageError: One of them is not finite.
        """
        examples = self._data.parts[part]
        totals = sums(self._forward, examples, part).tolist()
        return [total / int(e.targets.sum()) for total, e in zip(totals, examples, strict=True)]

    def measure(self, split: Split, names: Sequence[str]) -> tuple[dict[str, Measured], float | None]:
        """Each of `OWN_TASKS` on its examples of a split; see `Judge.measure`."""
        found: dict[str, Measured] = {}
        truncated: float | None = None
        of_part = {name: OWN_TASKS[name].parts[split == "holdout"] for name in names}
        for part in dict.fromkeys(of_part.values()):
            measured, share = self._judge.measure(part, [name for name in names if of_part[name] == part])
            found |= measured
            truncated = truncated if share is None else share
        return {name: found[name] for name in names}, truncated

    def _history(
        self, training: Training, steps: list[Step], tick: Callable[[int], None] | None
    ) -> Callable[[int], None]:
        """What to do after a step: `tick`, and where an epoch ends in it, measure the model and note it."""
        count, seen = len(self._data.parts["train"]), 0
        ends: dict[int, float] = {}
        for number, step in enumerate(steps):
            if (seen + len(step)) // count > seen // count or number == len(steps) - 1:
                ends[number] = (seen + len(step)) / count
            seen += len(step)

        def told(step: int) -> None:
            if tick is not None:
                tick(step)
            if step not in ends:
                return
            self._model.eval()
            found, truncated = self.measure("search", self._metrics)
            self._model.train()
            values = {name: value for name, (value, _) in found.items()}
            if truncated is not None:
                values["truncated"] = truncated
            training.history.append({"epochs": ends[step], **values})

        return told


def _state(folder: Path, key: str) -> Path:
    """Where the state of a training is that is not at its end."""
    return folder.with_name(f"{folder.name}.{key[:16]}.safetensors")


def _keep(adapter: adapters.Adapter, folder: Path, record: dict[str, Any]) -> None:
    """Save an adapter with its record, so that a folder of that name is complete."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        adapter.save(beside)
        (beside / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _record(folder: Path, key: str) -> Trained | None:
    """What is kept in `folder`, if it is the training with that key."""
    record = _content(folder)
    if record.get("key") != key:
        return None
    return Trained(record["metrics"], record["bytes"], record["sketch"], tuple(record["epochs"]))


def _content(folder: Path) -> dict[str, Any]:
    """The record in `folder`; empty if there is none."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
