"""What the tests of the merge stage share: adapters, and mergekit itself as the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmevo.genome import MergeSpec


def _save_lora(folder: Path, base: Path, *, seed: int, **options: Any) -> Path:
    """Save a PEFT LoRA on `base` whose B is not zero, as a trained one's."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        settings: dict[str, Any] = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
        }
        settings.update(options)
        peft = get_peft_model(model, LoraConfig(**settings))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
        peft.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def spec(tiny_llamas: Any) -> MergeSpec:
    """The three tiny parents and their base."""
    return MergeSpec(models=[str(p) for p in tiny_llamas.parents], base_model=str(tiny_llamas.base))


@pytest.fixture(scope="module")
def merger(spec: MergeSpec) -> Any:
    """Their merger, which a module's tests share: what it holds depends on what was merged before."""
    from llmevo.merge import Merger

    return Merger(spec, device="cpu", dtype="bfloat16")


@pytest.fixture(scope="session")
def make_lora() -> Callable[..., Path]:
    return _save_lora


@pytest.fixture(scope="session")
def loras(tiny_llamas, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters on the tiny base: a plain one, and one with rsLoRA, patterns and fewer targets."""
    root = tmp_path_factory.mktemp("loras")
    plain = _save_lora(root / "plain", tiny_llamas.base, seed=11)
    other = _save_lora(
        root / "rs",
        tiny_llamas.base,
        seed=12,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        alpha_pattern={"down_proj": 3},
        rank_pattern={"q_proj": 2},
    )
    return plain, other


def _run_mergekit(recipe: dict[str, Any], out: Path, seed: int | None = None) -> dict[str, Any]:
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file

    LoaderCache.loaders.clear()
    options = MergeOptions(
        random_seed=seed, quiet=True, write_model_card=False, lora_merge_cache=str(out / "loras")
    )
    # mergekit seeds every generator there is; the other tests must not notice.
    with torch.random.fork_rng(devices=[]):
        run_merge(MergeConfiguration.model_validate(copy.deepcopy(recipe)), str(out), options)
    LoaderCache.loaders.clear()
    return {key: t for file in out.glob("*.safetensors") for key, t in load_file(file).items()}


@pytest.fixture(scope="session")
def run_mergekit() -> Callable[..., dict[str, Any]]:
    """`run_mergekit(recipe, folder, seed)`: the tensors that mergekit's own `run_merge` writes."""
    return _run_mergekit
