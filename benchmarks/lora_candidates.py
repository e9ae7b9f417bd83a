"""What benchmarks/lora_search.py searches: LoRA settings for SmolLM2-135M, trained for real, once each.

The task is that of examples/lora_search.py: which language a word is, with words of other topics to choose by
and others again to report on. Adapters sit in the last layers only. What the layers below make of an example
is then the same for all candidates and all seeds, and the trainer computes it once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any, final

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from llmevo.errors import StageError
from llmevo.genome import load
from llmevo.genome.train import TrainSettings
from llmevo.recipe import Recipes
from llmevo.train import Trainer

ROOT = Path(__file__).resolve().parent.parent
GENOME = ROOT / "genomes" / "lora-smollm2.yaml"
LAYERS = 4  # the last ones, which have adapters
TOKENS = 4000  # of a candidate's training

Record = dict[str, Any]


@final
class Store:
    """Lines of JSON, of which a later one replaces an earlier one of the same key.

    Args:
        path: The file; made with the first line.
        packed: A compressed one that it adds to.
    """

    def __init__(self, path: Path, packed: Path | None = None) -> None:
        self._path = path
        known = packed is not None and packed.is_file()
        lines = lzma.decompress(packed.read_bytes()).decode().splitlines() if packed and known else []
        lines += path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.records = read_lines(lines)

    def add(self, record: Record) -> Record:
        """Keep a record, on the disk too."""
        self.records[record["key"]] = record
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
        return record


def read_lines(lines: Sequence[str]) -> dict[str, Record]:
    """Records by key; the line that was being written when a process was killed is passed over."""
    found: dict[str, Record] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["key"]] = record
    return found


@final
class Candidates:
    """Trains settings and says what they score; what the store knows is not trained again.

    Args:
        store: Of candidates.
        cache: Where the model and the examples lie, or are made.
        tokens: Of a candidate's training.
    """

    def __init__(self, store: Store, cache: Path = ROOT / ".cache", tokens: int = TOKENS) -> None:
        self._store, self._cache, self.tokens = store, cache, tokens
        files = {part: cache / "lora" / f"{part}.jsonl" for part in ("train", "validation", "test")}
        overrides = [f"train.data.{part}={file}" for part, file in files.items()]
        genome = load(GENOME, [*overrides, f"genome.models=[{cache / 'smollm2'}]", f"train.tokens={tokens}"])
        assert genome.train is not None
        # In what is stored the layers are a part of the task, not of the settings.
        self.spec = genome.train.model_copy(update={"layers": None, "together": "off"})
        self.space = Recipes(genome, 30).space
        self._trainer: Trainer | None = None

    def settings(self, params: Any, times: int = 1) -> TrainSettings:
        """The hyperparameters at a point of the space, with `times` the tokens."""
        spec = self.spec.model_copy(update={"tokens": times * self.tokens})
        return spec.settings(params)

    def chosen(self, arm: str, seed: int, times: int) -> TrainSettings:
        """The settings that a stored run handed over, with `times` the tokens of a candidate.

        Raises:
            KeyError: The run is not stored.
        """
        best = self._store.records[self._store.records[f"{arm}/{seed}"]["best"]]
        return TrainSettings(**{**best["settings"], "tokens": times * self.tokens})

    def score(self, settings: TrainSettings, seed: int, test: Callable[[float], bool]) -> Record:
        """Train settings with a seed, unless that is known.

        Args:
            settings: The hyperparameters.
            seed: Of the order of the examples and the adapter's first weights.
            test: Whether the held-out examples are wanted, given the mean validation loss.

        Returns:
            `validation` and `test` (where it was wanted once): the mean loss per learnt token of each
            example, in nats; `error` where the training diverged; `tokens` and `seconds`.
        """
        content = json.dumps([asdict(settings), seed, LAYERS], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:16]
        known = self._store.records.get(key)
        if known is not None and ("error" in known or "test" in known or not test(mean(known["validation"]))):
            return known
        record: Record = {"key": key, "settings": asdict(settings), "seed": seed}
        trainer = self._trainer = self._trainer or self._load()
        started = time.process_time()
        try:
            with trainer.candidate(replace(settings, layers=LAYERS), 0, "SmolLM2", seed=seed) as trained:
                record |= {"tokens": int(trained.metrics["tokens"]), "steps": int(trained.metrics["steps"])}
                record["parameters"] = int(trained.metrics["parameters"])
                record["seconds"] = round(time.process_time() - started, 2)
                record["validation"] = _short(trainer.losses("validation"))
                if test(mean(record["validation"])):
                    record["test"] = _short(trainer.losses("test"))
        except StageError as error:
            record["error"] = str(error)
        return self._store.add(record)

    def _load(self) -> Trainer:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        example = _example()
        example.prepare(self._cache, example.FULL)
        folder = self._cache / "smollm2"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()
        spec = self.spec.model_copy(update={"layers": LAYERS})
        return Trainer(spec, model, AutoTokenizer.from_pretrained(folder), seed=0)


def _example() -> ModuleType:
    """The script of this name among the examples, which prepares model and data."""
    sys.path.insert(0, str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location("lora_example", ROOT / "examples" / "lora_search.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mean(values: Sequence[float]) -> float:
    """The mean of the examples' losses."""
    return sum(values) / len(values)


def _short(losses: Sequence[float]) -> list[float]:
    return [round(loss, 4) for loss in losses]
