"""Every method trained on the same model and the same tokens, and what each costs and comes to."""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, final

from llmevo.errors import GenomeError
from llmevo.genome.train import ADAPTERS, PLAIN, TrainSettings, TrainSpec
from llmevo.train.memory import peak, source
from llmevo.train.trainer import Trainer
from llmevo.trial import standard_error

METHODS = tuple(name for name in ADAPTERS if name not in PLAIN)
"""The ones that are compared if none are named."""

# Learning rate and rank where they are others than 3e-4 and 32: those that the methods' papers and public
# comparisons use. PiSSA and LoRA+ (whose B learns 16 times faster) want less, few parameters want more.
_OWN: dict[str, dict[str, Any]] = {
    "loraplus": {"learning_rate": 1e-4},
    "pissa": {"learning_rate": 1e-4},
    "vera": {"learning_rate": 4e-3, "rank": 256},
    "ia3": {"learning_rate": 5e-3},
    "fourierft": {"learning_rate": 3e-2},
    "vblora": {"learning_rate": 5e-3, "rank": 4},
    "randlora": {"alpha": 640.0},
}
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
_TRAIN, _HELD_OUT = 600, 300  # words of the default data
_FEWEST = 2  # steps behind the first
_WARM = 200  # tokens of a training that is not counted: the first one finds nothing compiled or allocated


@final
@dataclass(frozen=True, slots=True)
class Row:
    """What one method came to.

    Args:
        method: Its name.
        learning_rate: It was trained with.
        rank: It has; None where it has none.
        trained: Share of the model's parameters that is trained.
        seconds: Median time of an optimizer step, over all seeds, the first one's left out.
        bytes: Most memory beyond the resident model, the largest of all seeds; None where nothing counts it.
        losses: Mean loss on the held-out examples after training, for each seed.
        loss: Their mean.
        stderr: Of `loss`, over the held-out examples.
        gain: The untrained model's loss less this one.
        gain_stderr: Of `gain`, over paired examples.
    """

    method: str
    learning_rate: float
    rank: int | None
    trained: float
    seconds: float
    bytes: int | None
    losses: list[float]
    loss: float
    stderr: float
    gain: float
    gain_stderr: float


def compare(
    model: Any,
    tokenizer: Any,
    data: dict[str, Any],
    methods: Sequence[str],
    *,
    tokens: int,
    seeds: int = 1,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train each method on the model, one after the other, with the same tokens in the same order.

    Args:
        model: A causal transformers model, frozen; as it was afterwards.
        tokenizer: Its tokenizer.
        data: What `train.data` may be; the validation part is what is held out.
        methods: Names of adapters.
        tokens: To train each on.
        seeds: How often, with other orders and first weights.
        note: Told a line after each method.

    Returns:
        JSON: the rows, the untrained model's loss, what was trained on, machine and versions.

    Raises:
        GenomeError: A method does not exist or does not fit, or the data is wrong.
    """
    unknown = [name for name in methods if name not in ADAPTERS]
    if unknown:
        raise GenomeError(
            f"`--methods` must name some of {', '.join(ADAPTERS)}, but got {unknown[0]!r}; change it."
        )
    spec = TrainSpec.model_validate({"data": data, "adapter": {"choice": list(methods)}, "tokens": tokens})
    trainers = [Trainer(spec, model, tokenizer, seed=seed, tokens="--tokens") for seed in range(seeds)]
    untrained = [trainer.losses("validation") for trainer in trainers]
    with trainers[0].candidate(TrainSettings(tokens=min(_WARM, tokens)), 0, "warm"):
        pass
    rows = []
    for method in methods:
        rows.append(_row(model, trainers, untrained, settings_of(method, tokens)))
        note(f"{method}: {rows[-1].loss:.3f} nats, {rows[-1].seconds:.2f} s a step")
    facts = trainers[0].describe()
    return {
        "rows": [asdict(row) for row in rows],
        "untrained": statistics.fmean(loss for losses in untrained for loss in losses),
        "model": model.config.name_or_path,
        "parameters": sum(p.numel() for p in model.parameters()),
        "examples": facts["examples"],
        "tokens": tokens,
        "seeds": seeds,
        "batch_size": TrainSettings().batch_size,
        "memory": source(model.device),
        "machine": _machine(model),
    }


def settings_of(method: str, tokens: int) -> TrainSettings:
    """The settings that a method is compared with."""
    return replace(TrainSettings(adapter=method, tokens=tokens), **_OWN.get(method, {}))


def _row(
    model: Any, trainers: Sequence[Trainer], untrained: Sequence[list[float]], settings: TrainSettings
) -> Row:
    losses, steps, sizes, parameters = [], [], [], 0.0
    for trainer in trainers:
        times: list[float] = []

        def tick(_: int, times: list[float] = times) -> None:
            times.append(time.perf_counter())

        with (
            peak(model.device) as most,
            trainer.candidate(settings, 0, "comparison", tick=tick) as trained,
        ):
            losses.append(trainer.losses("validation"))
            parameters = trained.metrics["parameters"]
        steps += [after - before for before, after in pairwise(times)]
        sizes.append(most.bytes)
    items = [statistics.fmean(values) for values in zip(*losses, strict=True)]
    start = [statistics.fmean(values) for values in zip(*untrained, strict=True)]
    gains = [before - after for before, after in zip(start, items, strict=True)]
    if len(steps) < _FEWEST:
        raise GenomeError(
            f"`--tokens` must be enough for {_FEWEST + 1} steps, of whose times the median is shown, but got "
            f"{settings.tokens}, which are {len(steps) // len(trainers) + 1}; raise it."
        )
    return Row(
        settings.adapter,
        settings.learning_rate,
        None if settings.adapter in ("ia3", "fourierft") else settings.rank,
        parameters / sum(p.numel() for p in model.parameters()),
        statistics.median(steps),
        None if None in sizes else max(size for size in sizes if size is not None),
        [statistics.fmean(values) for values in losses],
        statistics.fmean(items),
        _error(items),
        statistics.fmean(gains),
        _error(gains),
    )


def _error(values: Sequence[float]) -> float:
    return standard_error(values) or 0.0


def _machine(model: Any) -> dict[str, Any]:
    import platform

    import torch

    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    import platform

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


@contextmanager
def words() -> Iterator[dict[str, Any]]:
    """Data to learn: which language a word belongs to, from Babel; no meaning is in both parts."""
    from llmevo.embedded import language_names, words_of

    rows = [
        (meaning, {"prompt": f'"{word}" is', "completion": f" {language}"})
        for code, language in language_names()
        for word, meaning in words_of(code)
    ]
    meanings = sorted({meaning for meaning, _ in rows})
    random.Random(0).shuffle(meanings)
    random.Random(1).shuffle(rows)
    learnt = set(meanings[: len(meanings) // 2])
    parts = {
        "train": [row for meaning, row in rows if meaning in learnt][:_TRAIN],
        "validation": [row for meaning, row in rows if meaning not in learnt][:_HELD_OUT],
    }
    with tempfile.TemporaryDirectory(prefix="llmevo-words-") as folder:
        files = {}
        for part, content in parts.items():
            files[part] = str(Path(folder) / f"{part}.jsonl")
            Path(files[part]).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        yield {**files, "test": files["validation"]}
