"""How many LoRA candidates an hour, beside peft with transformers' Trainer, one candidate after the other?

    python benchmarks/training.py                      float32, every side
    python benchmarks/training.py --dtype bfloat16
    python benchmarks/training.py --device cuda --batch 16 --steps 30
    python benchmarks/training.py --report             the tables of what is stored

SmolLM2-135M, or `--model FOLDER`, learns to say what functions of installed packages do: the examples are
made of their docstrings, as an instruction and its answer. All sides see the same batches of the same
examples in the same order, start from the same adapter and have the same schedule, and their losses are
compared. They take turns (A B A B ...); medians are compared.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import inspect
import json
import logging
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import peft
import torch
import transformers

from llmevo import embedded
from llmevo.genome.train import TrainSettings
from llmevo.train import adapters
from llmevo.train.data import Example
from llmevo.train.forward import Forward
from llmevo.train.loop import Training, plan

_ROOT = Path(__file__).resolve().parent.parent
RESULTS = _ROOT / "benchmarks" / "results" / "training.json"
PACKAGES = (
    *("numpy", "scipy.stats", "scipy.linalg", "scipy.signal", "pandas", "torch", "sklearn.metrics"),
    *("statistics", "itertools", "collections", "pathlib", "random", "math", "json", "datetime"),
)
TITLES = {
    "llmevo": "llmevo's loop",
    "llmevo, top third": "llmevo's loop, adapters in the last third of the layers",
    "trainer": "peft and Trainer: padded to the longest, completion only",
    "trainer, flat": "peft and Trainer, padding-free (`DataCollatorWithFlattening`)",
    "trainer, top third": "peft and Trainer: padded to the longest, adapters in the last third",
}


def docstrings() -> list[tuple[str, str]]:
    """A name and up to two paragraphs about it, of all functions that say something of themselves."""
    found = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in sorted(dir(module)):
            thing = getattr(module, name)
            if name.startswith("_") or not callable(thing):
                continue
            paragraphs = [" ".join(part.split()) for part in (inspect.getdoc(thing) or "").split("\n\n")]
            told = [
                p for p in paragraphs if len(p) > 30 and p[-1] == "." and "->" not in p and ">>>" not in p
            ]
            if told:
                found[" ".join(told[:2])] = f"{package}.{name}"
    return [(name, text) for text, name in found.items() if len(text) < 600]


def examples(tokenizer: Any, count: int) -> list[Example]:
    """Instructions with their answers, of which the answers are learnt."""
    rows = random.Random(0).sample(docstrings(), count)
    made = []
    for name, text in rows:
        prompt = tokenizer(f"### Instruction:\nSay what `{name}` does.\n\n### Response:\n").input_ids
        tokens = [*prompt, *tokenizer(text).input_ids, tokenizer.eos_token_id]
        made.append(Example(np.array(tokens), np.arange(len(tokens)) >= len(prompt)))
    return made


class Recording(transformers.Trainer):
    """Trainer with the loss of each step; its own log rounds them."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's own, and what it gave."""
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), float(loss)]
        return loss


class Bench:
    """The sides, on one model in memory.

    Args:
        model: Frozen.
        rows: The examples.
        settings: Of the training.
    """

    def __init__(self, model: Any, rows: list[Example], settings: TrainSettings, folder: Path) -> None:
        self.model, self.rows, self.settings, self.folder = model, rows, settings, folder
        self.targets = adapters.Targets(model)
        self.forward = Forward(model, rows)
        self.third = max(self.targets.layers // 3, 1)

    def of_llmevo(self, settings: TrainSettings) -> list[float]:
        """Losses of our loop."""
        steps = plan(self.rows, settings, 0)
        config = adapters.config(settings, self.targets, 0, len(steps))
        with adapters.adapted(self.model, settings, config, "cand0000", 0) as adapter:
            training = Training(self.forward, adapter, self.rows, settings, 0, steps)
            training.run(self.model)
        return training.losses

    def of_trainer(self, settings: TrainSettings, flat: bool = False) -> list[float]:
        """Losses of transformers' Trainer, as its own log has them."""
        steps = plan(self.rows, settings, 0)
        data = [self.rows[index] for step in steps for index, _ in step]
        config = adapters.config(settings, self.targets, 0, len(steps))
        torch.manual_seed(0)
        with adapters.quiet_peft():
            wrapped = peft.get_peft_model(self.model, config)
        arguments = transformers.TrainingArguments(
            output_dir=str(self.folder),
            per_device_train_batch_size=settings.batch_size,
            num_train_epochs=1,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=settings.clip,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=self.model.device.type == "cpu",
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
        )
        columns = [
            {"input_ids": e.tokens.tolist(), "labels": np.where(e.targets, e.tokens, -100).tolist()}
            for e in data
        ]
        collate = transformers.DataCollatorWithFlattening() if flat else _padded
        try:
            trainer = Recording(wrapped, arguments, train_dataset=columns, data_collator=collate)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            return trainer.losses
        finally:
            wrapped.unload()
            if hasattr(self.model, "peft_config"):
                del self.model.peft_config
            self.model.requires_grad_(False).eval()

    def sides(self) -> dict[str, Callable[[], list[float]]]:
        """What is timed, by name."""
        whole = self.settings
        top = TrainSettings(**{**_fields(whole), "layers": self.third})
        return {
            "llmevo": lambda: self.of_llmevo(whole),
            "trainer": lambda: self.of_trainer(whole),
            "trainer, flat": lambda: self.of_trainer(whole, flat=True),
            "llmevo, top third": lambda: self.of_llmevo(top),
            "trainer, top third": lambda: self.of_trainer(top),
        }


def _fields(settings: TrainSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in TrainSettings.__slots__}


def _padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of equal length, as transformers' collators for padding make them."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> torch.Tensor:
        return torch.tensor([[*row[key], *([value] * (width - len(row[key])))] for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": filled("input_ids", 0),
        "labels": filled("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def measure(bench: Bench, names: list[str], runs: int) -> dict[str, Any]:
    """Seconds of each side, run by run, with its losses."""
    sides = {name: side for name, side in bench.sides().items() if name in names}
    found: dict[str, Any] = {name: {"seconds": []} for name in sides}
    for run in range(runs):
        for name, side in sides.items():
            gc.collect()
            start = time.perf_counter()
            found[name]["losses"] = side()
            found[name]["seconds"].append(time.perf_counter() - start)
            print(f"run {run + 1}: {name:20s} {found[name]['seconds'][-1]:7.2f} s", flush=True)
    return found


def report(stored: dict[str, Any]) -> None:
    """Print the tables of what is stored."""
    for kind, one in stored.items():
        work, sides = one["work"], one["sides"]
        print(f"\n{kind}: {work}")
        for ours, theirs in (
            ("llmevo", "trainer"),
            ("llmevo", "trainer, flat"),
            ("llmevo, top third", "trainer, top third"),
            ("llmevo, top third", "trainer"),
        ):
            if ours not in sides or theirs not in sides:
                continue
            mine, other = (statistics.median(sides[name]["seconds"]) for name in (ours, theirs))
            gap = max(abs(a - b) for a, b in zip(sides[ours]["losses"], sides[theirs]["losses"], strict=True))
            print(
                f"| {TITLES[theirs]} | {other:.1f} | {TITLES[ours]} | {mine:.1f} | {3600 / mine:.0f} "
                f"| **{other / mine:.2f}** | {gap:.1e} |"
            )


def main() -> None:
    """Time the sides, store what was found, and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=_ROOT / ".cache" / "smollm2")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=list(TITLES), choices=list(TITLES), metavar="SIDE")
    parser.add_argument("--report", action="store_true", help="print what is stored, time nothing")
    options = parser.parse_args()
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if options.report:
        report(stored)
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    folder = options.model if options.model.is_dir() else embedded.smollm2(options.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).requires_grad_(False).eval()
    rows = examples(tokenizer, options.batch * options.steps)
    settings = TrainSettings(batch_size=options.batch, epochs=1, warmup=0)
    lengths = np.array([len(row) for row in rows])
    work = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "batch": options.batch,
        "steps": options.steps,
        "tokens": int(lengths.sum()),
        "targets": int(sum(row.targets.sum() for row in rows)),
        "lengths": {f"{q} %": float(np.percentile(lengths, q)) for q in (0, 10, 50, 90, 100)},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    print(json.dumps(work))
    bench = Bench(model, rows, settings, _ROOT / ".cache" / "training")
    stored[f"{options.device} {options.dtype}"] = {
        "work": work,
        "sides": measure(bench, options.sides, options.runs),
    }
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    report({key: value for key, value in stored.items() if key == f"{options.device} {options.dtype}"})


if __name__ == "__main__":
    main()
