"""mergekit-evolve's in-memory evaluator on a list of candidates, in an environment of its own (see setup.py).

    PYTHON driver.py GENOME CANDIDATES TASKS --first 0 --count 3 --threads 2 --out rows.json

It runs the published evaluator, `mergekit.evo.actors.InMemoryMergeEvaluator.evaluate_genotype`, one array
after another, and writes for each one the seconds of merge and evaluation and the scores. Ray is left out:
the actor's class is used directly, which spares it the start of Ray, its queue, and the one thread that Ray
would give it (`--threads 1` is what Ray gives, since it sets OMP_NUM_THREADS to the actor's one CPU).

Nothing in site-packages is changed. What is mended here, so that it starts at all, is marked OBSTACLE; what
makes it faster than it is published is off unless asked for, and marked GENEROUS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any


def stub_vllm() -> None:
    """Let mergekit.evo be imported where vLLM is not installed.

    OBSTACLE: actors.py evaluates `lm_eval.models.vllm_causallms.VLLM` in a class annotation at import, which
    is an AttributeError with every lm_eval since 0.4.10, and monkeypatch.py imports that module, which needs
    vLLM. Older lm_evals do not work with the transformers 5 that is needed otherwise. An empty module of that
    name serves both.
    """
    import lm_eval.models

    module = types.ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = type("VLLM", (), {})  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    lm_eval.models.vllm_causallms = module


def complete_architectures() -> None:
    """Let mergekit's architectures hold a configuration of transformers 5.12.

    OBSTACLE: that configuration's annotations name `torch` without importing it, so that pydantic leaves the
    classes which hold one undefined until they are told what `torch` is.
    """
    import torch
    from mergekit.architecture import base

    for holder in (base.ConfiguredModuleArchitecture, base.ConfiguredModelArchitecture):
        holder.model_rebuild(_types_namespace={"torch": torch})


def without_ray() -> Any:
    """The evaluator's class without the actor around it.

    OBSTACLE: the actor asks Ray for a GPU and waits for ever where there is none.
    """
    from mergekit.evo.actors import InMemoryMergeEvaluator

    return InMemoryMergeEvaluator.__ray_metadata__.modified_class


def allow_batches(size: int) -> None:
    """GENEROUS: evaluate `size` requests at once.

    Published, the model is wrapped as `HFLM(pretrained=inner_model)`, whose batch size is 1, and
    `simple_evaluate` ignores the batch size that it is given beside a model object.
    """
    import lm_eval.models.huggingface as huggingface

    original = huggingface.HFLM.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{"batch_size": size, **kwargs})

    huggingface.HFLM.__init__ = init


def evaluator(genome_path: Path, task_folder: Path) -> Any:
    """What `mergekit-evolve GENOME --in-memory --no-merge-cuda --no-reshard` makes, with its options.

    `--merge-cuda` (the default) finds no device on this machine. `--reshard` would copy each parent into one
    bfloat16 file, which they are.
    """
    import lm_eval.tasks
    import yaml
    from mergekit.evo.config import EvolMergeConfiguration
    from mergekit.evo.genome import ModelGenome
    from mergekit.options import MergeOptions

    config = EvolMergeConfiguration.model_validate(yaml.safe_load(genome_path.read_text()))
    options = MergeOptions(
        cuda=False,
        low_cpu_memory=False,
        out_shard_size=1_000_000_000_000,
        random_seed=0,
        quiet=True,
        read_to_gpu=False,
        copy_tokenizer=True,
        safe_serialization=True,
    )
    manager = lm_eval.tasks.TaskManager(include_path=str(task_folder))
    return without_ray()(config, ModelGenome(config.genome), options, task_manager=manager)


def digest(model: Any) -> str:
    """SHA-256 of the model's parameters, by name."""
    import torch

    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(name.encode())
        found.update(parameter.detach().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def timed(actors: Any, skip: bool) -> dict[str, float]:
    """Time the evaluation inside of `evaluate`, or skip it; the rest is planning and merging."""
    seconds = {"evaluate": 0.0}
    original = actors._eval_model

    def run(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = {"score": None, "results": {}} if skip else original(*args, **kwargs)
        seconds["evaluate"] = time.perf_counter() - started
        return result

    actors._eval_model = run
    return seconds


def main() -> None:
    """Evaluate the candidates and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("genome", type=Path)
    parser.add_argument("candidates", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--merge-only", action="store_true", help="do not evaluate")
    parser.add_argument("--save", type=Path, help="folder for the merged weights of each candidate")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    started = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    stub_vllm()
    import mergekit.evo.actors as actors
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(options.threads)
    if options.batch_size > 1:
        allow_batches(options.batch_size)
    complete_architectures()
    worker = evaluator(options.genome, options.tasks)
    seconds = timed(actors, options.merge_only)
    arrays = json.loads(options.candidates.read_text())
    # Building the model belongs to the start; as published the first candidate pays for it.
    worker._maybe_init_model(worker.genome.genotype_merge_config(torch.tensor(arrays[0])))
    loaded = time.perf_counter()
    rows = []
    for number in range(options.first, options.first + options.count):
        begun = time.perf_counter()
        result = worker.evaluate_genotype(torch.tensor(arrays[number]))
        wall = time.perf_counter() - begun
        evaluate = seconds["evaluate"]
        rows.append(
            {
                "candidate": number,
                "wall": wall,
                "merge": wall - evaluate,
                "evaluate": evaluate,
                "score": result["score"],
                "tasks": {task: values["acc,none"] for task, values in result["results"].items()},
                "sha256": digest(worker.model.model),
            }
        )
        if options.save is not None:
            options.save.mkdir(parents=True, exist_ok=True)
            tensors = {name: p.detach().clone() for name, p in worker.model.model.named_parameters()}
            save_file(tensors, options.save / f"{number}.safetensors")
        options.out.write_text(json.dumps({"start": loaded - started, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
