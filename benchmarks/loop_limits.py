"""Where llmevo's seconds go, against what the machine can do; and whose weights and scores are the same."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from loop_data import BASE, CACHE, PARENTS, SEED
from loop_systems import Setting, llmevo, lm_eval

HERE = Path(__file__).resolve().parent
COUNT = 5  # candidates; the first is not counted
REPEATS = 7


def limits(setting: Setting) -> dict[str, Any]:
    """Run candidates in this process, timing the forward passes, and measure the machine beside it.

    Returns:
        Seconds of a candidate by part (medians), the bytes and operations that its method and its packed
        tokens need, and the machine's speed at copying and at multiplying matrices of the same dtype.
    """
    os.environ["LLMEVO_CACHE"] = "off"
    import torch

    torch.set_num_threads(setting.threads)
    from llmevo import genome as genomes
    from llmevo.pipeline import Job, MergePipeline

    data = yaml.safe_load(setting.paths["genome"].read_text())
    data["search"] = {"halving": {"enabled": False}}
    data["evaluate"] = {"task_path": [str(setting.paths["tasks"])], "holdout": 0.0, "dtype": setting.dtype}
    data["evaluate"]["device"] = "cpu"
    pipeline = MergePipeline(genomes.Genome.model_validate(data))
    watch = _Forwards(pipeline._merger.model)
    rows = []
    for number in range(COUNT):
        recipe = yaml.safe_load((setting.paths["recipes"] / f"{number}.yaml").read_text())
        watch.reset()
        started = time.perf_counter()
        outcome = pipeline.run(Job(number, {}, SEED, recipe=recipe))
        wall = time.perf_counter() - started
        if outcome.error is not None:
            raise RuntimeError(outcome.error)
        rows.append({"wall": wall, **outcome.seconds, "forward": watch.seconds})
    machine = _machine(pipeline._merger.model)
    parts = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    read = len(PARENTS) + (setting.method != "linear")
    size = sum(p.numel() * p.element_size() for p in pipeline._merger.model.parameters())
    return {
        "items": setting.items,
        "seconds": parts,
        "tokens": watch.tokens,
        "logits": watch.logits,
        "operations": watch.operations,
        "bytes": (read + 1) * size,
        "machine": machine,
    }


class _Forwards:
    """Counts what a model's forward passes take and need.

    Attributes:
        seconds: Wall time inside of them.
        tokens: Tokens put in.
        logits: Positions whose logits came out.
        operations: Of the linear layers on the tokens and of the head on the positions; attention left out.
    """

    def __init__(self, model: Any) -> None:
        head = model.get_output_embeddings().weight
        inside = {id(head), id(model.get_input_embeddings().weight)}
        self._trunk = sum(p.numel() for p in model.parameters() if id(p) not in inside and p.dim() == 2)
        self._head = head.numel()
        model.register_forward_pre_hook(lambda *_: self._begin(), with_kwargs=True)
        model.register_forward_hook(self._end, with_kwargs=True)
        self.reset()

    def reset(self) -> None:
        """Begin to count."""
        self.seconds, self.tokens, self.logits = 0.0, 0, 0

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * (self.tokens * self._trunk + self.logits * self._head)

    def _begin(self) -> None:
        self._started = time.perf_counter()

    def _end(self, _: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        self.seconds += time.perf_counter() - self._started
        tokens = named["input_ids"] if "input_ids" in named else arguments[0]
        self.tokens += tokens.numel()
        self.logits += output.logits.shape[0] * output.logits.shape[1]


def _machine(model: Any) -> dict[str, float]:
    """Bytes moved in a second by a copy of the model's size, and operations of products of matrices.

    `matmul` is of square matrices, `layers` of 512 tokens through the model's own linear layers, one after
    another: the same bytes of weights, nothing in between.
    """
    import torch

    weights = [p for p in model.parameters() if p.dim() == 2][1:]
    dtype = weights[0].dtype
    count = sum(p.numel() for p in model.parameters())
    source, target = torch.ones(count, dtype=dtype), torch.empty(count, dtype=dtype)
    copy = _best(lambda: target.copy_(source))
    side = 2048
    square = torch.randn(side, side).to(dtype)
    matmul = _best(lambda: square @ square)
    inputs = {w.shape[1]: torch.randn(512, w.shape[1]).to(dtype) for w in weights}
    with torch.inference_mode():
        layers = _best(lambda: [torch.nn.functional.linear(inputs[w.shape[1]], w) for w in weights])
    return {
        "copy": 2 * source.numel() * source.element_size() / copy,
        "matmul": 2 * side**3 / matmul,
        "layers": 2 * 512 * sum(w.numel() for w in weights) / layers,
    }


def _best(work: Callable[[], Any]) -> float:
    """Seconds: the median after one run that is not counted."""
    work()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def table(found: dict[str, dict[str, Any]]) -> str:
    """Where each second goes, and the share of the limit."""
    lines = []
    for method, each in found.items():
        seconds, machine = each["seconds"], each["machine"]
        merge, forward = each["bytes"] / machine["copy"], each["operations"] / machine["matmul"]
        plain = each["operations"] / machine["layers"]
        scoring = seconds["evaluate"] - seconds["forward"]
        rest = seconds["wall"] - seconds["merge"] - seconds["evaluate"]
        ideal = merge + forward
        lines += [
            f"### {method}, {each['items']} items: where a candidate's {seconds['wall']:.2f} s go",
            "| part | s | share | at the limit, s | of the limit |",
            "|---|---|---|---|---|",
            f"| merge | {seconds['merge']:.3f} | {seconds['merge'] / seconds['wall']:.1%} | {merge:.3f} | "
            f"{merge / seconds['merge']:.0%} |",
            f"| forward | {seconds['forward']:.3f} | {seconds['forward'] / seconds['wall']:.1%} | "
            f"{forward:.3f} | {forward / seconds['forward']:.0%} |",
            f"| scoring | {scoring:.3f} | {scoring / seconds['wall']:.1%} | | |",
            f"| pipeline | {rest:.4f} | {rest / seconds['wall']:.2%} | | |",
            f"| whole | {seconds['wall']:.3f} | | {ideal:.3f} | {ideal / seconds['wall']:.0%} |",
            "",
            f"{each['tokens']} tokens, {each['logits']} rows of logits, {each['operations'] / 1e12:.2f} T "
            f"operations, {each['bytes'] / 1e9:.2f} GB; copy {machine['copy'] / 1e9:.1f} GB/s, square "
            f"product {machine['matmul'] / 1e9:.0f} GFLOP/s, the model's own layers one after another "
            f"{machine['layers'] / 1e9:.0f} GFLOP/s ({plain:.3f} s).",
            f"- {'PASS' if ideal / seconds['wall'] >= 0.5 else 'FAIL'}  a whole trial at "
            f"{ideal / seconds['wall']:.0%} of the limit; wanted 50 %",
            "",
        ]
    return "\n".join(lines)


def compare(setting: Setting) -> dict[str, Any]:
    """Weights of candidate 1 against mergekit's, and its accuracies in float32 against lm-eval's.

    Needs the merged folder that the command line left behind.
    """
    import torch
    from safetensors.torch import load_file

    from llmevo.genome import MergeSpec, MergeStageSpec
    from llmevo.merge import Merger

    data = yaml.safe_load(setting.paths["genome"].read_text())
    recipe = yaml.safe_load((setting.paths["recipes"] / "1.yaml").read_text())
    merged = CACHE / "merged" / setting.method / "1"
    theirs = {f"mergekit {_version()}": load_file(merged / "model.safetensors")}
    theirs["mergekit-evolve (mergekit 0.1.4)"] = _evolved(setting)
    found: dict[str, Any] = {}
    for mode in ("exact", "fast"):
        merger = Merger(
            MergeSpec.model_validate(data["genome"]),
            MergeStageSpec(mode=mode),
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
        )
        merger.merge(recipe, 0)
        ours = dict(merger.model.named_parameters())
        for name, tensors in theirs.items():
            found[f"{mode} against {name}"] = _difference(ours, tensors)
    single = replace(setting, dtype="float32")
    _, rows = llmevo(single, [1], mode="exact")
    reference = lm_eval(single, merged, Path(sys.executable).parent)
    found["float32 accuracies"] = {"llmevo": rows[0]["tasks"], "lm-eval": reference}
    found["float32 accuracies equal"] = rows[0]["tasks"] == reference
    return found


def _version() -> str:
    from importlib.metadata import version

    return version("mergekit")


def _evolved(setting: Setting) -> dict[str, Any]:
    """What mergekit-evolve merges of candidate 1."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as name:
        command = [str(setting.evolve), str(HERE / "evolve" / "driver.py"), str(setting.paths["genome"])]
        command += [str(setting.paths["candidates"]), str(setting.paths["tasks"]), "--first", "1"]
        command += ["--merge-only", "--save", name, "--out", f"{name}/rows.json"]
        subprocess.run(command, check=True, capture_output=True)
        return dict(load_file(Path(name) / "1.safetensors"))


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Share of equal elements and the largest difference, over the tensors that both have."""
    equal = total = 0
    largest = relative = 0.0
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name].detach(), theirs[name]
        equal += int((a == b).sum())
        total += a.numel()
        gap = (a.float() - b.float()).abs()
        largest = max(largest, float(gap.max()))
        relative = max(relative, float(gap.max() / b.float().abs().max()))
    shared = len(ours.keys() & theirs.keys())
    return {"tensors": shared, "equal": equal / total, "largest": largest, "of the largest weight": relative}


__all__ = ["BASE", "compare", "limits", "table"]
