"""No adapter against LoRA against IA3, on a GPT-2 and a T5: loss, ROUGE and BLEU per epoch, in one figure.

Both models are made here, in a minute: tiny ones that learn to write dates in six languages (CLDR's words,
from Babel). genomes/compare-adapters.yaml then trains adapters that are to write them in three other
languages, with the base frozen. Ends with a table of the test examples and RUNS/compare.png.

    python examples/compare_adapters.py            # minutes on two cores
    python examples/compare_adapters.py --smoke    # a few steps of everything, to see that it works
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Before transformers is imported: everything is on this machine.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from quickstart import llmevo, say

ROOT = Path(__file__).resolve().parent.parent
GENOME = ROOT / "genomes" / "compare-adapters.yaml"
KNOWN = ("en", "fr", "es", "sv", "pl", "pt")  # what the models learn first
NEW = ("de", "it", "nl")  # what the adapters are for
MODELS = {"gpt2": "GPT-2", "t5": "T5"}
METRICS = {"validation_loss": "loss (nats per token)", "rougeL": "ROUGE-L", "bleu": "BLEU"}
SIZES = {"train": 480, "validation": 90, "test": 150}
SMOKE = ("train.epochs=2", "search.trials=4", "evaluate.finalists=2")


def rows(locales: Sequence[str], count: int, seed: int) -> list[dict[str, str]]:
    """Dates with their weekdays as numbers, and as CLDR writes them out; no date twice."""
    from babel.dates import format_date

    rng = random.Random(seed)
    days = rng.sample(range(40 * 365), count)
    found = []
    for number, day in enumerate(days):
        date = datetime.date(1990, 1, 1) + datetime.timedelta(days=day)
        locale = locales[number % len(locales)]
        prompt = f"{locale} {date.isoformat()} {date.isoweekday()}:"
        found.append({"prompt": prompt, "completion": f" {format_date(date, 'full', locale=locale)}"})
    return found


def tokenizer_of(texts: list[str]) -> Any:
    """A byte-level BPE of 600 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[1])


def untrained(kind: str, vocabulary: int) -> Any:
    """A GPT-2 or a T5 of three layers, at random."""
    import transformers as hf

    ends = {"pad_token_id": 0, "eos_token_id": 1}
    if kind == "gpt2":
        shape = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 96, "bos_token_id": 1}
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=vocabulary, **shape, **ends))
    shape = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4}
    config = hf.T5Config(vocab_size=vocabulary, decoder_start_token_id=0, dropout_rate=0.0, **shape, **ends)
    return hf.T5ForConditionalGeneration(config)


def batches(kind: str, tokenizer: Any, examples: list[dict[str, str]], steps: int) -> Iterator[dict]:
    """Padded batches of 48 with the labels that transformers wants."""
    import torch

    rng = random.Random(0)
    for _ in range(steps):
        chosen = rng.sample(examples, 48)
        asked = [row["prompt"] for row in chosen]
        said = [row["completion"] + tokenizer.eos_token for row in chosen]
        texts = asked if kind == "t5" else [a + b for a, b in zip(asked, said, strict=True)]
        given = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        wanted = given.input_ids
        if kind == "t5":
            wanted = tokenizer(said, return_tensors="pt", padding=True).input_ids
        yield {**given, "labels": torch.where(wanted == tokenizer.pad_token_id, -100, wanted)}


def pretrain(kind: str, folder: Path, tokenizer: Any, examples: list[dict[str, str]], steps: int) -> None:
    """Train a model on all of its weights, and save it."""
    import torch

    torch.manual_seed(0)
    model = untrained(kind, len(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    loss = torch.tensor(0.0)
    for batch in batches(kind, tokenizer, examples, steps):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    say(kind, f"{sum(p.numel() for p in model.parameters())} weights, loss {float(loss.detach()):.3f}")


def prepare(cache: Path, smoke: bool) -> None:
    """Make the data and both models in `cache`, unless they are there."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    cache.mkdir(parents=True, exist_ok=True)
    new, start = rows(NEW, sum(SIZES.values()), 1), 0
    for part, count in SIZES.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in new[start : start + count]]
        (cache / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        start += count
    say("data", f"{new[0]['prompt']}{new[0]['completion']}")
    known = rows(KNOWN, 6000, 0)
    tokenizer = tokenizer_of([row["prompt"] + row["completion"] for row in [*known, *new]])
    for kind in MODELS:
        if not (cache / kind / "config.json").is_file():
            pretrain(kind, cache / kind, tokenizer, known, 20 if smoke else 500)


def curves(run_dir: Path) -> dict[str, list[dict[str, float]]]:
    """What was measured after 0, 1, 2, ... epochs: of each adapter the trial with the lowest last loss."""
    from llmevo.store import Store

    with Store.open(run_dir, readonly=True) as store:
        trials = [trial for trial in store.trials() if trial.score is not None]
    base = {name: next(iter(trials[0].metrics[name].values())) for name in METRICS}
    found: dict[str, list[dict[str, float]]] = {}
    for trial in trials[1:]:
        epochs = [value for key, value in trial.metrics.items() if key.startswith("epoch ")]
        adapter = str(trial.params["train.adapter"])
        if adapter not in found or epochs[-1]["validation_loss"] < found[adapter][-1]["validation_loss"]:
            found[adapter] = [{"epochs": 0.0, **base}, *epochs]
    return {"no adapter": [{**epoch, **base} for epoch in next(iter(found.values()))], **found}


def draw(runs: dict[str, Path], path: Path) -> None:
    """One row of axes for each model, one column for each metric."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(len(runs), len(METRICS), figsize=(11, 6), sharex=True, squeeze=False)
    styles = {"no adapter": ("0.5", "--"), "lora": ("tab:blue", "-"), "ia3": ("tab:orange", "-")}
    for axes, (name, run_dir) in zip(grid, runs.items(), strict=True):
        for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
            for kind, history in curves(run_dir).items():
                colour, line = styles[kind]
                values = [epoch[metric] for epoch in history]
                marker = None if kind == "no adapter" else "o"
                label = {"lora": "LoRA", "ia3": "IA3"}.get(kind, kind)
                steps = [epoch["epochs"] for epoch in history]
                axis.plot(steps, values, line, color=colour, marker=marker, markersize=4, label=label)
            axis.set_title(f"{name}: {title}", fontsize=10)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    for axis in grid[-1]:
        axis.set_xlabel("epochs")
    grid[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def table(runs: dict[str, Path]) -> str:
    """The test examples: what each model scores without an adapter, and with the better one of each kind."""
    from llmevo.store import Store

    lines = [f"{'model':8}{'adapter':12}{'lr':>8}{'loss':>8}{'ROUGE-L':>9}{'BLEU':>7}"]
    for name, run_dir in runs.items():
        with Store.open(run_dir, readonly=True) as store:
            trials = {trial.number: trial for trial in store.trials()}
            held = {row.number: row.metrics for row in store.holdout() if row.score is not None}
        best: dict[str, tuple[Any, dict[str, float]]] = {}
        for number, metrics in held.items():
            params = trials[number].params
            adapter = str(params.get("train.adapter", "none"))
            values = {metric: next(iter(metrics[metric].values())) for metric in METRICS}
            # Chosen by the validation examples, as a user has to.
            if adapter not in best or trials[number].value > trials[best[adapter][0]].value:
                best[adapter] = number, values
        for adapter, (number, values) in best.items():
            rate = trials[number].params.get("train.learning_rate", "")
            numbers = f"{values['validation_loss']:8.3f}{values['rougeL']:9.3f}{values['bleu']:7.1f}"
            lines.append(f"{name:8}{adapter:12}{rate!s:>8}{numbers}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare adapters on a GPT-2 and a T5.")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--folder", type=Path, default=ROOT, help="where .cache and runs lie")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    prepare(folder / ".cache" / "compare", options.smoke)
    runs = {name: folder / "runs" / f"compare-{kind}" for kind, name in MODELS.items()}
    for kind, run_dir in zip(MODELS, runs.values(), strict=True):
        overrides = [f"genome.models=[.cache/compare/{kind}]", *(SMOKE if options.smoke else ())]
        settings = [part for override in overrides for part in ("--set", override)]
        where = str(run_dir.relative_to(folder))
        code = llmevo("run", str(GENOME), "--run-dir", where, *settings, folder=folder, shown=False)
        if code:
            return code
    draw(runs, folder / "runs" / "compare.png")
    print(table(runs))
    say("figure", str(folder / "runs" / "compare.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
