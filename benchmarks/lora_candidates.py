"""What benchmarks/lora_search.py searches: LoRA settings for SmolLM2-135M, trained for real, once each.

The task is that of examples/lora_search.py: which language a word is, with words of other topics to choose by
and others again to report on. Adapters sit in the last layers only. What the layers below make of an example
is then the same for all candidates and all seeds, so it is computed once (`Below`).
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import lzma
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
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
_TOGETHER = 64  # examples in one pass through the layers below

Record = dict[str, Any]


@final
class Below(torch.nn.Module):
    """Stands in for the embeddings: what the frozen layers below make of each example, computed once.

    Args:
        body: The frozen part of the model; it returns hidden states that no norm was applied to.
        end: The token that ends every example.
    """

    def __init__(self, body: Any, end: int) -> None:
        super().__init__()
        self._body = (body,)  # in a tuple, so that its modules are no modules of the model to adapt
        self._end = end
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def learn(self, examples: Sequence[tuple[int, ...]]) -> None:
        """Compute examples, a few at a time; padding behind an example changes nothing before it."""
        new = sorted(set(examples) - set(self._known), key=lambda tokens: (len(tokens), tokens))
        for start in range(0, len(new), _TOGETHER):
            group = new[start : start + _TOGETHER]
            width = max(map(len, group))
            rows = torch.tensor([[*tokens, *[self._end] * (width - len(tokens))] for tokens in group])
            with torch.no_grad():
                states = self._body[0](rows, use_cache=False).last_hidden_state
            for tokens, state in zip(group, states, strict=True):
                self._known[tokens] = state[: len(tokens)].clone()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states of rows of whole examples, shape (rows, width, hidden); 0 behind the last example."""
        body = self._body[0]
        states = torch.zeros(*tokens.shape, body.config.hidden_size, dtype=body.dtype)
        for place, row in enumerate(tokens.tolist()):
            start = 0
            while any(row[start:]):  # the rest of a row is padded with zeros
                example = self._first(tuple(row[start:]))
                self.learn([example])
                states[place, start : start + len(example)] = self._known[example]
                start += len(example)
        return states

    def _first(self, row: tuple[int, ...]) -> tuple[int, ...]:
        """The example that a row begins with."""
        stop = row.index(self._end) + 1 if self._end in row else len(row)
        if row[:stop] in self._known:
            return row[:stop]
        # Where the budget cuts an example off, it has no end, and a whole one may stand behind it.
        cuts = (cut for cut in range(1, stop) if row[cut:stop] in self._known)
        return row[: next(cuts, stop)]


def divide(model: Any, layers: int, end: int) -> Below:
    """Leave a Llama-type model its last `layers` layers; the others are `Below`, in the embeddings' place."""
    body = copy.deepcopy(model.model)
    first = len(body.layers) - layers
    body.layers, body.norm = body.layers[:first], torch.nn.Identity()
    body.config.num_hidden_layers = first
    below = Below(body, end)
    model.model.layers, model.model.embed_tokens = model.model.layers[first:], below
    model.config.num_hidden_layers = layers
    return below


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
        self.spec = genome.train
        self.space = Recipes(genome, 30).space
        self._model: Any = None
        self._trainers: dict[int, Trainer] = {}

    def settings(self, params: Any, times: int = 1) -> TrainSettings:
        """The hyperparameters at a point of the space, with `times` the tokens."""
        spec = self.spec.model_copy(update={"tokens": times * self.tokens})
        return spec.settings(params)

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
        trainer = self._trainer(seed)
        started = time.process_time()
        try:
            with trainer.candidate(settings, 0, "SmolLM2") as trained:
                record |= {"tokens": int(trained.metrics["tokens"]), "steps": int(trained.metrics["steps"])}
                record["parameters"] = int(trained.metrics["parameters"])
                record["seconds"] = round(time.process_time() - started, 2)
                record["validation"] = _short(trainer.losses("validation"))
                if test(mean(record["validation"])):
                    record["test"] = _short(trainer.losses("test"))
        except StageError as error:
            record["error"] = str(error)
        return self._store.add(record)

    def _trainer(self, seed: int) -> Trainer:
        if seed not in self._trainers:
            if self._model is None:
                self._load()
            model, tokenizer = self._model
            self._trainers.clear()  # one at a time: it is remade in a second
            self._trainers[seed] = Trainer(self.spec, model, tokenizer, seed=seed)
        return self._trainers[seed]

    def _load(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from llmevo.train.data import load as load_examples

        example = _example()
        example.prepare(self._cache, example.FULL)
        folder = self._cache / "smollm2"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()
        below = divide(model, LAYERS, tokenizer.eos_token_id)
        parts = load_examples(self.spec.data, tokenizer, model.config.max_position_embeddings, 0).parts
        below.learn([tuple(e.tokens.tolist()) for examples in parts.values() for e in examples])
        self._model = model, tokenizer


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
