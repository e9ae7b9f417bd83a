"""How long does a merge take, beside mergekit's own in the same process?

    python benchmarks/merging.py --models DIR                 every method; DIR gets the models once
    python benchmarks/merging.py --models DIR --methods ties linear --runs 3
    python benchmarks/merging.py --report                     the table from results/merging.json

The models are SmolLM2-135M-Instruct and three parents made from it: every matrix gets a random change of
rank 8 and noise, seeded, of 3 % of its own spread each. mergekit is `merge_state_dicts` on tensors in
memory, llmevo is `Merger.merge` into the resident model; both in `--dtype`, with the same number of threads,
in turns (A B A B), and each time with other parameters, so that nothing can be kept. Before the times, both
merge the same recipe and the results are compared. The bound is a plain compiled loop that reads as many
models as the method does and writes one. karcher and model_stock have no numbers to vary: llmevo is made to
forget its last merge.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

THREADS = 2
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, str(THREADS))
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

RESULTS = Path(__file__).resolve().parent / "results" / "merging.json"
COUNT = 3

# Parameters of each model, parameters of the recipe, and how many models are read beside the base.
METHODS: dict[str, tuple[dict[str, float], dict[str, Any], int, bool]] = {
    "linear": ({}, {}, 3, False),
    "task_arithmetic": ({}, {}, 3, True),
    "slerp": ({}, {"t": 0.4}, 2, False),
    "nuslerp": ({}, {}, 2, False),
    "multislerp": ({}, {}, 3, True),
    "karcher": ({}, {}, 3, False),
    "model_stock": ({}, {}, 3, True),
    "ties": ({"density": 0.5}, {}, 3, True),
    "dare_ties": ({"density": 0.5}, {}, 3, True),
    "dare_linear": ({"density": 0.5}, {}, 3, True),
    "della": ({"density": 0.5, "epsilon": 0.1}, {}, 3, True),
    "breadcrumbs": ({"density": 0.8, "gamma": 0.02}, {}, 3, True),
}
_RANDOM = ("dare_ties", "dare_linear", "della")
_UNWEIGHTED = ("slerp", "karcher", "model_stock")


def make_models(root: Path) -> tuple[Path, list[Path]]:
    """Save SmolLM2 and its parents, unless they are there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmevo import embedded

    base = embedded.smollm2(root / "base")
    parents = [root / f"parent-{number}" for number in range(COUNT)]
    for number, folder in enumerate(parents):
        if (folder / "model.safetensors").is_file():
            continue
        generator = torch.Generator().manual_seed(number)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                spread = float(parameter.float().std()) * 0.03
                change = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim == 2:
                    up = torch.randn(parameter.shape[0], 8, generator=generator)
                    change += up @ torch.randn(8, parameter.shape[1], generator=generator) / 8**0.5
                parameter.copy_(parameter.float() + spread * change)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return base, parents


def parameters(method: str, turn: int) -> tuple[list[dict[str, float]], dict[str, Any], int, bool]:
    """What a turn merges with; no two turns are alike."""
    own, shared, count, based = METHODS[method]
    shift = 0.004 * turn
    models: list[dict[str, float]] = []
    for i in range(count):
        weight = {} if method in _UNWEIGHTED else {"weight": 0.2 + 0.15 * i + shift}
        models.append(weight | {k: v - (shift if k == "density" else 0) for k, v in own.items()})
    return models, {k: v + shift for k, v in shared.items()}, count, based


def recipe(method: str, turn: int, base: Path, parents: list[Path], dtype: str) -> dict[str, Any]:
    """The turn as a mergekit configuration."""
    models, shared, count, based = parameters(method, turn)
    used = parents[:count]
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(p), "parameters": m} for p, m in zip(used, models, strict=True)],
        "parameters": shared,
        "dtype": dtype,
    }
    if method == "slerp":
        config["base_model"] = str(used[0])
    return config | ({"base_model": str(base)} if based else {})


def mergekit_call(method: str, turn: int, tensors: list[dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The turn as a call of mergekit; `tensors` are the base's and the parents'."""
    from mergekit.merge_methods import merge_state_dicts

    models, shared, count, based = parameters(method, turn)
    inputs = [tensors[0], *tensors[1 : count + 1]] if based else tensors[1 : count + 1]
    values: dict[str, Any] = dict(shared)
    for name in models[0]:
        values[name] = [m[name] for m in models]
    if method == "linear":
        values["normalize"] = True
    origin = 0 if based or method == "slerp" else None
    return lambda: merge_state_dicts(inputs, method, parameters=values, base=origin)


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bound(merger: Any, count: int, runs: int) -> float:
    """Seconds to read `count` models and write one, in a loop that does nothing else."""
    import torch

    buffers = merger._arena.buffers[: count + 1]
    size = min(buffer.numel() for buffer in buffers)
    bits = {2: torch.uint16, 4: torch.uint32}[buffers[0].element_size()]
    arrays = [buffer[:size].view(bits).numpy() for buffer in buffers]
    return statistics.median(_read(arrays) for _ in range(runs))


def _read(arrays: list[Any]) -> float:
    """One pass of the plain loop, shared by as many threads as the merge has."""
    from concurrent.futures import ThreadPoolExecutor

    step = 1 << 21
    parts = [slice(low, low + step) for low in range(0, len(arrays[0]), step)]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda part: mix(arrays[0][:1], [a[:1] for a in arrays[1:]]), parts[:1]))
        start = time.perf_counter()
        list(pool.map(lambda part: mix(arrays[0][part], [a[part] for a in arrays[1:]]), parts))
        return time.perf_counter() - start


def mix(out: Any, sources: list[Any]) -> None:
    """Exclusive or of all sources: the least that reads them and writes one."""
    _kernels()[len(sources)](out, *sources)


def _kernels() -> dict[int, Any]:
    if not _KERNELS:
        from numba import njit

        from llmevo.merge.cells import wide

        @njit(nogil=True)  # type: ignore[misc]
        def two(out, a, b):  # type: ignore[no-untyped-def]
            wide()
            for i in range(out.size):
                out[i] = a[i] ^ b[i]

        @njit(nogil=True)  # type: ignore[misc]
        def three(out, a, b, c):  # type: ignore[no-untyped-def]
            wide()
            for i in range(out.size):
                out[i] = a[i] ^ b[i] ^ c[i]

        @njit(nogil=True)  # type: ignore[misc]
        def four(out, a, b, c, d):  # type: ignore[no-untyped-def]
            wide()
            for i in range(out.size):
                out[i] = a[i] ^ b[i] ^ c[i] ^ d[i]

        _KERNELS.update({2: two, 3: three, 4: four})
    return _KERNELS


_KERNELS: dict[int, Any] = {}


def compare(
    method: str, ours: dict[str, Any], theirs: dict[str, Any], base: dict[str, Any]
) -> dict[str, float]:
    """How far two merges of one recipe are apart; for random masks, in their statistics."""
    sums = [0.0] * 4
    largest = units = 0.0
    for name, tensor in theirs.items():
        a, b, c = ours[name].float(), tensor.float(), base[name].float()
        apart = (a - b).abs()
        largest = max(largest, float(apart.max()))
        unit = (b.abs().clamp(min=2.0**-12).log2().floor() - 7).exp2()
        units = max(units, float((apart / unit).max()))
        parts = (apart, (b - c).abs(), (a - c).abs(), (apart > unit).float())
        sums = [total + float(part.double().sum()) for total, part in zip(sums, parts, strict=True)]
    count = sum(t.numel() for t in theirs.values())
    apart_mean, change, own_change, far = (total / count for total in sums)
    if method in _RANDOM:
        return {"mean change, mergekit": change, "mean change, llmevo": own_change}
    return {
        "largest difference": largest,
        "largest, in bf16 units of the result": units,
        "share of elements further than one unit": far,
        "mean difference / mean change": apart_mean / change,
    }


def measure(methods: list[str], root: Path, runs: int, dtype: str) -> None:
    """Compare and time methods, and store each as soon as it is done."""
    import torch
    from safetensors.torch import load_file

    from llmevo.genome import MergeSpec
    from llmevo.merge import Merger

    torch.set_num_threads(THREADS)
    base, parents = make_models(root)
    spec = MergeSpec(models=[str(p) for p in parents], base_model=str(base), dtype=dtype)
    merger = Merger(spec, dtype=dtype)
    wanted = getattr(torch, dtype)
    tensors = [
        {name: t.to(wanted) for name, t in load_file(folder / "model.safetensors").items()}
        for folder in (base, *parents)
    ]
    size = sum(t.numel() for t in tensors[0].values())
    rows = {}
    for method in methods:
        _, _, count, based = METHODS[method]
        with torch.no_grad():
            merger.merge(recipe(method, 0, base, parents, dtype), seed=0)
            theirs = mergekit_call(method, 0, tensors)()
            state = merger.model.state_dict()
            difference = compare(method, state, theirs, tensors[0])
            del theirs
            slow, fast, resolving = [], [], []
            slow_runs = runs if not slow_first(method) else max(2, runs // 3)
            for turn in range(1, runs + 1):
                if turn <= slow_runs:
                    slow.append(timed(mergekit_call(method, turn, tensors)))
                config = recipe(method, turn, base, parents, dtype)
                if method in _UNWEIGHTED[1:]:
                    merger._fast.forget()
                fast.append(timed(lambda config=config: merger.merge(config, seed=0)))
                again = recipe(method, turn, base, parents, dtype)
                resolving.append(timed(lambda again=again: merger.merge(again, seed=0)))
        limit = bound(merger, count + based, 5)
        merger._fast.forget()  # the bound's loop wrote into the resident model
        ours, mergekit = statistics.median(fast), statistics.median(slow)
        moved = (count + based + 1) * size * wanted.itemsize
        name = method if dtype == "bfloat16" else f"{method} ({dtype})"
        rows[name] = {
            "mergekit_seconds": mergekit,
            "llmevo_seconds": ours,
            "resolve_seconds": statistics.median(resolving),
            "ratio": mergekit / ours,
            "gigabytes_per_second": moved / ours / 1e9,
            "bound_seconds": limit,
            "times_bound": ours / limit,
            "difference": difference,
        }
        print(line(name, rows[name]), flush=True)
        store(RESULTS, {"machine": machine(), "size": size, "runs": runs, "methods": {name: rows[name]}})


def store(path: Path, results: dict[str, Any]) -> None:
    """Write what was measured beside what is stored of other methods."""
    if path.is_file():
        results["methods"] = json.loads(path.read_text(encoding="utf-8"))["methods"] | results["methods"]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def slow_first(method: str) -> bool:
    """Whether mergekit takes seconds, so that fewer turns of it are enough."""
    return METHODS[method][0] != {}


def machine() -> dict[str, str]:
    """What the times were taken on."""
    cpu = next(
        (
            x.split(":")[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in x
        ),
        platform.processor(),
    )
    names = ("mergekit", "torch", "numba", "numpy")
    return {"cpu": cpu, "threads": str(THREADS), "python": platform.python_version()} | {
        name: version(name) for name in names
    }


def line(method: str, row: dict[str, Any]) -> str:
    """One row of the table."""
    notes = ", ".join(f"{name} {value:.2g}" for name, value in row["difference"].items())
    return (
        f"| {method} | {row['mergekit_seconds']:.3f} | {row['llmevo_seconds']:.3f} | {row['ratio']:.1f} | "
        f"{row['gigabytes_per_second']:.1f} | {row['times_bound']:.2f} | "
        f"{row['resolve_seconds'] * 1e3:.1f} | {notes} |"
    )


def report(results: dict[str, Any]) -> str:
    """The table in Markdown."""
    head = [
        f"{results['machine']}, {results['size']:,} parameters, medians of {results['runs']} turns",
        "",
        "| method | mergekit, s | llmevo, s | ratio | GB/s | times the bound | resolve, ms | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(line(name, row) for name, row in results["methods"].items())])


def main() -> None:
    """Read the arguments, measure, store and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder for the models, about 1.1 GB")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--runs", type=int, default=7, help="turns of each method")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--report", action="store_true", help="print the stored table")
    arguments = parser.parse_args()
    if not arguments.report:
        if arguments.models is None:
            parser.error("`--models` must name a folder, unless `--report` is given")
        measure(arguments.methods, arguments.models, arguments.runs, arguments.dtype)
    print(report(json.loads(RESULTS.read_text(encoding="utf-8"))), file=sys.stdout)


if __name__ == "__main__":
    main()
