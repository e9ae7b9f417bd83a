"""How fast are packed log-likelihoods, beside lm-eval's HFLM at its best batch size?

    python benchmarks/evaluation.py                    every workload, float32
    python benchmarks/evaluation.py --dtype bfloat16 --device cuda
    python benchmarks/evaluation.py --workloads arc hellaswag --items 16
    python benchmarks/evaluation.py --float64          how far either side is from the exact answers
    python benchmarks/evaluation.py --report           the table of what is stored

SmolLM2-135M, or `--model FOLDER`, answers made-up items with the lengths of real ones. Both sides get the
same tokens and the same weights in one process and take turns (A B A B ...); medians are compared, and the
answers too. HFLM first tries several batch sizes on a part of the items and then runs at its fastest. The
rate of a plain matrix product of the model's size is timed in between: what the machine could do at best.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import logging
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers

from llmevo import embedded

_ROOT = Path(__file__).resolve().parent.parent
RESULTS = _ROOT / "benchmarks" / "results" / "evaluation.json"
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
TARGETS = {"arc": 2.5, "hellaswag": 2.0, "random-shots": 4.0, "fixed-shots": 10.0}
TITLES = {
    "arc": "ARC-like, 0-shot: question of about 30 tokens, 4 choices of 4 to 12",
    "hellaswag": "HellaSwag-like, 0-shot: context of 60 to 80 tokens, 4 endings of about 25",
    "random-shots": "ARC-like, 5-shot, other shots for each item",
    "fixed-shots": "ARC-like, 5-shot, the same shots for all items",
    "letters": "MMLU-like, 5-shot, choices are one letter (HFLM shares these too)",
}
_ITEMS = {"arc": 32, "hellaswag": 16, "random-shots": 6, "fixed-shots": 12, "letters": 8}
_TRIED = 3  # items on which batch sizes are tried
_WORDS = """
water light heat sound plant animal rock river ocean cloud metal glass paper wood stone sand soil
leaf root seed flower fruit insect bird fish horse farmer student teacher doctor engine wheel magnet
battery circuit energy force motion speed weight mass volume pressure temperature gravity planet
moon star sun earth season winter summer weather storm wind rain snow ice the a which most likely
because when after before during through into from with without under over between near causes makes
moves grows changes becomes shows keeps gives takes holds turns melts freezes falls rises quickly
slowly often never always more less small large warm cold bright dark heavy hard soft clean new old
long short first second same different
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Item:
    """A context, its choices, and which of them counts as right."""

    context: str
    choices: tuple[str, ...]
    gold: int


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def _question(rng: random.Random) -> tuple[str, tuple[str, ...]]:
    question = f"Question: {_text(rng, rng.randint(18, 30)).capitalize()}?\nAnswer:"
    return question, tuple(f" {_text(rng, rng.randint(4, 12))}" for _ in range(4))


def _shots(rng: random.Random, count: int = 5) -> str:
    return "".join(
        f"{question}{choices[0]}\n\n" for question, choices in (_question(rng) for _ in range(count))
    )


def _lettered(rng: random.Random, answer: str = "") -> str:
    question, choices = _question(rng)
    listed = "\n".join(f"{letter}.{choice}" for letter, choice in zip("ABCD", choices, strict=True))
    return question.replace("\nAnswer:", f"\n{listed}\nAnswer:{answer}")


def items(workload: str, count: int, seed: int = 0) -> list[Item]:
    """`count` items of a workload, the same for the same seed."""
    rng = random.Random(f"{workload} {seed}")
    fixed = _shots(rng)
    lettered = "".join(_lettered(rng, f" {rng.choice('ABCD')}\n\n") for _ in range(5))
    made = []
    for _ in range(count):
        gold = rng.randrange(4)
        if workload == "hellaswag":
            endings = tuple(f" {_text(rng, rng.randint(18, 32))}." for _ in range(4))
            made.append(Item(_text(rng, rng.randint(60, 80)).capitalize(), endings, gold))
        elif workload == "letters":
            made.append(Item(lettered + _lettered(rng), (" A", " B", " C", " D"), gold))
        else:
            before = {"arc": "", "random-shots": _shots(rng), "fixed-shots": fixed}[workload]
            question, choices = _question(rng)
            made.append(Item(before + question, choices, gold))
    return made


def accuracies(made: list[Item], answers: list[tuple[float, bool]]) -> dict[str, float]:
    """lm-eval's `acc` and `acc_norm` of the answers."""
    right = {"acc": 0, "acc_norm": 0}
    for number, item in enumerate(made):
        scores = [score for score, _ in answers[4 * number : 4 * number + 4]]
        normed = [score / len(choice) for score, choice in zip(scores, item.choices, strict=True)]
        right["acc"] += scores.index(max(scores)) == item.gold
        right["acc_norm"] += normed.index(max(normed)) == item.gold
    return {name: value / len(made) for name, value in right.items()}


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def matmul_rate(model: Any, repeats: int = 20) -> float:
    """Operations a second of the model's widest product, on 512 rows (16384 off the CPU): the best."""
    config, device = model.config.get_text_config(), model.device
    rows = 512 if device.type == "cpu" else 16384
    weight = torch.randn(config.intermediate_size, config.hidden_size, device=device, dtype=model.dtype)
    left = torch.randn(rows, config.hidden_size, device=device, dtype=model.dtype)
    best = min(timed(lambda: torch.nn.functional.linear(left, weight), device)[0] for _ in range(repeats + 3))
    return 2.0 * rows * weight.numel() / best


def operations(model: Any, packing: Any) -> float:
    """Operations of the linear layers that the packed tokens need; attention is not counted."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    ends = {id(embedding), id(head)}
    trunk = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in ends)
    rows = sum(len(batch.logits) for batch in packing.batches)
    return 2.0 * (trunk * packing.computed + head.numel() * rows)


def requests_of(lm: Any, made: list[Item]) -> list[Any]:
    """lm-eval's requests for items: the two strings, and the tokens of each."""
    return [
        ((item.context, choice), *lm._encode_pair(item.context, choice))
        for item in made
        for choice in item.choices
    ]


def in_float64(model: Any) -> Any:
    """A copy of a Llama-type model that computes in float64 all through.

    transformers' RMSNorm rounds to float32 whatever the weights are, so it is replaced.
    """
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(
                torch.nn.functional.rms_norm,
                normalized_shape=tuple(module.weight.shape),
                weight=module.weight,
                eps=module.variance_epsilon,
            )
    return exact


def errors(workload: str, model: Any, tokenizer: Any, count: int) -> dict[str, Any]:
    """How far log-probabilities are from those in float64, and how often a greedy answer differs.

    Returns:
        For `packed` and `HFLM` (each request by itself): the largest error, the mean one, and greedy answers
        that are others than in float64.
    """
    from lm_eval.models.huggingface import HFLM

    from llmevo.evaluate.lm import ResidentLM

    ours = ResidentLM(pretrained=model, tokenizer=tokenizer)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    requests = requests_of(ours, items(workload, count))
    packing = ours.pack(requests)
    if packing is None:
        raise SystemExit(f"this model is not packed: {ours.why_not}")
    answers = {
        "packed": ours.answer(packing),
        "HFLM": stock._loglikelihood_tokens(list(requests), disable_tqdm=True),
    }
    exact = HFLM(pretrained=in_float64(model), tokenizer=tokenizer, batch_size=1)
    truth = exact._loglikelihood_tokens(list(requests), disable_tqdm=True)
    found: dict[str, Any] = {"requests": len(requests)}
    for side, given in answers.items():
        off = [abs(one[0] - other[0]) for one, other in zip(given, truth, strict=True)]
        found[side] = {
            "largest": max(off),
            "mean": statistics.fmean(off),
            "greedy": sum(one[1] != other[1] for one, other in zip(given, truth, strict=True)),
        }
    return found


def compare(
    workload: str, model: Any, tokenizer: Any, count: int, repeats: int, shown: Callable[[str], None]
) -> dict[str, Any]:
    """Run one workload on both sides, in turns."""
    from lm_eval.models.huggingface import HFLM

    from llmevo.evaluate.lm import ResidentLM

    ours = ResidentLM(pretrained=model, tokenizer=tokenizer)
    stock = HFLM(pretrained=model, tokenizer=tokenizer)
    made = items(workload, count)
    requests = requests_of(ours, made)
    part = requests[: 4 * _TRIED]
    tried, answered = {}, {}
    stock._loglikelihood_tokens(part[:4], disable_tqdm=True)
    for size in BATCH_SIZES:
        if size >= 2 * len(part):
            break
        stock.batch_size_per_gpu = size
        tried[size], answered[size] = timed(
            lambda: stock._loglikelihood_tokens(part, disable_tqdm=True), model.device
        )
        shown(f"  HFLM, batch size {size}: {tried[size]:.2f} s for {len(part)} requests")
    best = min(tried, key=tried.__getitem__)
    stock.batch_size_per_gpu = best
    planned, packing = timed(lambda: ours.pack(requests), model.device)
    if packing is None:
        raise SystemExit(f"this model is not packed: {ours.why_not}")
    ours.answer(packing)
    seconds: dict[str, list[float]] = {"packed": [], "HFLM": []}
    rates, differences = [], []
    for turn in range(repeats):
        rates.append(matmul_rate(model))
        spent, mine = timed(lambda: ours.answer(packing), model.device)
        seconds["packed"].append(spent)
        spent, theirs = timed(
            lambda: stock._loglikelihood_tokens(list(requests), disable_tqdm=True), model.device
        )
        seconds["HFLM"].append(spent)
        differences += [abs(m[0] - t[0]) for m, t in zip(mine, theirs, strict=True)]
        shown(f"  turn {turn + 1}: packed {seconds['packed'][-1]:.2f} s, HFLM {spent:.2f} s")
    packed, plain = (statistics.median(seconds[side]) for side in ("packed", "HFLM"))
    work, rate = operations(model, packing), statistics.median(rates)
    return {
        "items": count,
        "seconds": seconds,
        "ratio": plain / packed,
        "ratio to batch size 1": plain / packed * tried[1] / tried[best],
        "batch size": best,
        "batch sizes": tried,
        "seconds to plan": planned,
        "tokens": {"HFLM": packing.tokens, "packed": packing.computed},
        "tokens per second": packing.computed / packed,
        "operations per second": work / packed,
        "matmul": rate,
        "share of matmul": work / packed / rate,
        "largest difference": max(differences),
        "difference of batch sizes": max(
            abs(one[0] - other[0]) for one, other in zip(answered[1], answered[best], strict=True)
        ),
        "same greedy": [g for _, g in mine] == [g for _, g in theirs],
        "accuracies": [accuracies(made, mine), accuracies(made, theirs)],
    }


def report(stored: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    lines = []
    for machine, results in stored.items():
        lines += [
            f"{machine}",
            "",
            "| workload | packed | HFLM at its best (batch size) | ratio | wanted | over batch size 1 "
            "| tokens, HFLM to packed | share of a plain product | largest difference "
            "| HFLM's own, batch size 1 to best | same accuracies |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for workload, r in results.items():
            packed, plain = (statistics.median(r["seconds"][side]) for side in ("packed", "HFLM"))
            same = "yes" if r["accuracies"][0] == r["accuracies"][1] else f"no: {r['accuracies']}"
            wanted = f"{TARGETS[workload]:g}" if workload in TARGETS else ""
            title = f"{TITLES[workload]}; {r['items']} items"
            lines.append(
                f"| {title} | {packed:.2f} s | {plain:.2f} s ({r['batch size']}) "
                f"| **{r['ratio']:.1f}** | {wanted} | {r['ratio to batch size 1']:.1f} "
                f"| {r['tokens']['HFLM']} to {r['tokens']['packed']} | {r['share of matmul']:.0%} "
                f"| {r['largest difference']:.1e} | {r['difference of batch sizes']:.1e} | {same} |"
            )
        lines.append("")
    return "\n".join(lines)


def machine(model: Any) -> str:
    """What the figures hold for."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    if device.type == "cpu":
        text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
        name = f"{names[0] if names else name}, {torch.get_num_threads()} threads"
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"{type(model).__name__} of {millions:.0f} M parameters, {str(model.dtype).removeprefix('torch.')}, "
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    folder = args.model or embedded.smollm2(_ROOT / ".cache" / "smollm2")
    dtype = getattr(torch, args.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def main() -> None:
    """Run what is asked for, store it, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--items", type=int, help="items of each workload")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", type=Path, help="a folder with another model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--float64", action="store_true", help="errors against float64; nothing is timed")
    parser.add_argument("--report", action="store_true", help="only print what is stored")
    args = parser.parse_args()
    stored = json.loads(args.results.read_text()) if args.results.exists() else {}
    if not args.report:
        torch.set_num_threads(args.threads)
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model, tokenizer = load(args)
        for workload in args.workloads:
            print(TITLES[workload], flush=True)
            count = args.items or _ITEMS[workload]
            if args.float64:
                print(json.dumps(errors(workload, model, tokenizer, count)), flush=True)
                continue
            result = compare(workload, model, tokenizer, count, args.repeats, lambda s: print(s, flush=True))
            stored.setdefault(machine(model), {})[workload] = result
            args.results.parent.mkdir(parents=True, exist_ok=True)
            args.results.write_text(json.dumps(stored, indent=1) + "\n")
    if not args.float64:
        print(report(stored))


if __name__ == "__main__":
    main()
