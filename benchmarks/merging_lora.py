"""What adapters cost to hold and to merge: as factors, as matrices, and in mergekit.

    python benchmarks/merging_lora.py --models DIR            DIR gets SmolLM2 and three adapters once
    python benchmarks/merging_lora.py --report                the table from results/merging_lora.json

The adapters sit on all linear layers of SmolLM2-135M-Instruct, random and seeded. All three ways merge the
same recipes in turns (A B C A B C), each turn with other weights. mergekit gets full models that hold the
adapters already, in memory, as it would have made them on the disk before; making them is not timed. What is
held is the base and the parents; each way holds one merged model too.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import merging

RESULTS = Path(__file__).resolve().parent / "results" / "merging_lora.json"
METHODS = {"linear": False, "task_arithmetic": True}
COUNT = 3


def make_adapters(root: Path, rank: int) -> tuple[Path, list[Path]]:
    """Save SmolLM2 and its adapters, unless they are there."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from llmevo import embedded

    base = embedded.smollm2(root / "base")
    folders = [root / f"rank-{rank}-{number}" for number in range(COUNT)]
    for number, folder in enumerate(folders):
        if (folder / "adapter_model.safetensors").is_file():
            continue
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, settings)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.005)
        adapted.save_pretrained(folder)
    return base, folders


def recipe(method: str, turn: int, base: Path, parents: list[str]) -> tuple[dict[str, Any], list[float]]:
    """The turn as a mergekit configuration, and its weights; no two turns are alike."""
    weights = [0.25 + 0.125 * i + turn / 256 for i in range(len(parents))]
    config = {
        "merge_method": method,
        "models": [{"model": p, "parameters": {"weight": w}} for p, w in zip(parents, weights, strict=True)],
        "dtype": "bfloat16",
    }
    return config | ({"base_model": str(base)} if METHODS[method] else {}), weights


def measure(root: Path, rank: int, runs: int) -> dict[str, Any]:
    """Compare and time both methods."""
    import torch
    from mergekit.merge_methods import merge_state_dicts

    from llmevo.genome import MergeSpec
    from llmevo.merge import Merger

    torch.set_num_threads(merging.THREADS)
    base, folders = make_adapters(root, rank)
    parents = [f"{base}+{folder}" for folder in folders]
    spec = MergeSpec(models=parents, base_model=str(base), merge_method=list(METHODS))
    factors = Merger(spec)
    # A method with masks in the genome has the adapters held as matrices.
    matrices = Merger(spec.model_copy(update={"merge_method": [*METHODS, "ties"]}))
    full = [dict(model.tensors) for model in matrices._loaders.values()]
    held = {
        "factors": factors.bytes_held,
        "matrices": matrices.bytes_held,
        "mergekit": sum(t.numel() * t.element_size() for model in full for t in model.values()),
    }
    rows = {}
    for method, based in METHODS.items():
        origin = full[0]
        times: dict[str, list[float]] = {name: [] for name in held}
        for turn in range(runs + 1):
            config, weights = recipe(method, turn, base, parents)
            values: dict[str, Any] = {"weight": weights} | ({} if based else {"normalize": True})
            inputs = full if based else full[1:]
            call = functools.partial(
                merge_state_dicts, inputs, method, parameters=values, base=0 if based else None
            )
            theirs: dict[str, Any] = {}

            with torch.no_grad():
                seconds = {
                    "mergekit": merging.timed(lambda out=theirs, call=call: out.update(call())),
                    "matrices": merging.timed(lambda config=config: matrices.merge(config, seed=0)),
                    "factors": merging.timed(lambda config=config: factors.merge(config, seed=0)),
                }
            if turn == 0:  # compiles, and is compared
                difference = merging.compare(method, factors.model.state_dict(), theirs, origin)
                continue
            for name, value in seconds.items():
                times[name].append(value)
        rows[method] = {
            "seconds": {name: statistics.median(values) for name, values in times.items()},
            "difference": difference,
        }
    return {"machine": merging.machine(), "rank": rank, "runs": runs, "bytes_held": held, "methods": rows}


def report(results: dict[str, Any]) -> str:
    """The tables in Markdown."""
    lines = [f"{results['machine']}, {COUNT} adapters, medians of {results['runs']} turns", ""]
    for rank, result in results["ranks"].items():
        megabytes = {name: f"{count / 1e6:.0f}" for name, count in result["bytes_held"].items()}
        lines += [f"rank {rank}: MB held {megabytes}"]
        for method, row in result["methods"].items():
            times = ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in row["seconds"].items())
            lines.append(f"  {method}: {times}; {row['difference']}")
    return "\n".join(lines)


def main() -> None:
    """Read the arguments, measure, store and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder for the models, about 0.5 GB")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=7, help="turns of each method")
    parser.add_argument("--report", action="store_true", help="print the stored tables")
    arguments = parser.parse_args()
    if not arguments.report:
        if arguments.models is None:
            parser.error("`--models` must name a folder, unless `--report` is given")
        result = measure(arguments.models, arguments.rank, arguments.runs)
        stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"ranks": {}}
        stored["ranks"][str(arguments.rank)] = result
        stored |= {"machine": result.pop("machine"), "runs": result.pop("runs")}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(report(json.loads(RESULTS.read_text(encoding="utf-8"))), file=sys.stdout)


if __name__ == "__main__":
    main()
