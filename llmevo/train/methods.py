"""What each method is in peft's words: its configuration, and what of it does not fit a model."""

from __future__ import annotations

import math
from typing import Any

from llmevo.errors import GenomeError
from llmevo.genome.spec import IntGene
from llmevo.genome.train import FREE_INIT, PLAIN, TrainSettings, TrainSpec, values_of
from llmevo.train import nf4
from llmevo.train.adapters import quiet_peft
from llmevo.train.targets import MLP, Targets

_PISSA = "pissa_niter_16"  # the randomised SVD: minutes less than the full one, and as good a start
_BY_NAME = ("ia3", "shira")  # methods that have no choice of layers in peft, so that modules have full names
_FLAGS: dict[str, dict[str, Any]] = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
_USUAL_ONLY = ("shira", "loha", "lokr", "miss", "oft")  # methods that peft does not put on transposed weights
_ANY_RANK = ("ia3", "vera", "randlora", "lokr", "oft", "fourierft", "vblora")
_LONGEST_VECTOR = 256  # of VB-LoRA, as peft has it


def check(spec: TrainSpec, targets: Targets) -> None:
    """Check everything that the genes may choose against the model, before anything is spent.

    Raises:
        GenomeError: A target matches nothing, a rank does not fit a layer, or a package is not installed.
    """
    nf4.check(spec)
    refused = [name for name in values_of(spec.adapter) if name in _USUAL_ONLY]
    if "olora" in values_of(spec.init) and any(name in FREE_INIT for name in values_of(spec.adapter)):
        refused.append("init: olora")
    if targets.transposed and refused:
        raise GenomeError(
            f"`train` must not have {refused[0]} with this model, whose modules hold their weights "
            "transposed, as GPT-2's do: peft does it for usual linear modules only; remove it."
        )
    depth = [value for value in values_of(spec.layers) if value is not None]
    for target in values_of(spec.target_modules):
        chosen = tuple(target) if isinstance(target, list) else target
        settings = TrainSettings(target_modules=chosen, layers=max(depth) if depth else None)
        modules = targets.modules(settings)
        for adapter in values_of(spec.adapter):
            _check_rank(adapter, max(values_of(spec.rank)), modules)
            if adapter == "oft":
                _check_blocks(spec.rank, modules)


def _check_rank(adapter: str, rank: int, modules: dict[str, tuple[int, int]]) -> None:
    if adapter in _ANY_RANK:
        return
    name, shape = min(modules.items(), key=lambda item: min(item[1]))
    most, what = min(shape), "the smaller side"
    if adapter == "adalora":
        most, what = most * 2 // 3, "two thirds of the smaller side (adalora begins with half more)"
    if adapter == "shira":
        name, shape = min(modules.items(), key=lambda item: math.prod(item[1]) / sum(item[1]))
        most, what = math.prod(shape) // sum(shape), "the elements over the sum of the sides"
    if rank > most:
        raise GenomeError(
            f"`train.rank` must be <= {most}, {what} of `{name}` {list(shape)}, but may be {rank}; lower it, "
            "or leave that module out of `train.target_modules`."
        )


def _check_blocks(setting: Any, modules: dict[str, tuple[int, int]]) -> None:
    ranks = values_of(setting)
    if isinstance(setting, IntGene):
        ranks = list(range(ranks[0], ranks[1] + 1, setting.step))
    for rank in ranks:
        for name, (inputs, _) in modules.items():
            if inputs % rank:
                raise GenomeError(
                    f"`train.rank`, with oft the side of its blocks, must divide the {inputs} inputs of "
                    f"`{name}`, but may be {rank}; give a divisor."
                )


def config(settings: TrainSettings, targets: Targets, seed: int, steps: int) -> Any:
    """The configuration for peft.

    Args:
        settings: The hyperparameters.
        targets: Of the model.
        seed: Of what a method draws and does not train: VeRA's projections, SHiRA's mask.
        steps: Optimizer steps of the training, over which AdaLoRA plans its ranks.
    """
    import peft

    names = targets.suffixes(settings)
    first = targets.layers - (settings.layers or targets.layers)
    chosen = None if first == 0 else list(range(first, targets.layers))
    common: dict[str, Any] = {"task_type": targets.task_type, "target_modules": names}
    if settings.adapter not in _USUAL_ONLY:
        # NF4 modules hold their weights the usual way round, whatever they were made from.
        common["fan_in_fan_out"] = targets.transposed and settings.adapter != "qlora"
    if settings.adapter in _BY_NAME or targets.nested:
        full = names if chosen is None else sorted(targets.modules(settings))
        common["target_modules"] = full
    else:
        common["layers_to_transform"] = chosen
    if settings.adapter == "ia3":
        ends = tuple(f".{name}" for name in full)
        inside = {n for n in targets.modules(settings) if f".{n}".endswith(ends) and MLP.search(n)}
        forward = [name for name in full if any(f".{n}".endswith(f".{name}") for n in inside)]
        return peft.IA3Config(feedforward_modules=forward, **common)
    if settings.adapter == "vera":
        return peft.VeraConfig(
            r=settings.rank, vera_dropout=settings.dropout, projection_prng_key=seed, **common
        )
    if settings.adapter in PLAIN:
        return _plain(settings, targets, seed, common)
    if settings.adapter == "adalora":
        scale = {"lora_alpha": whole(settings.alpha), "lora_dropout": settings.dropout}
        return peft.AdaLoraConfig(**adalora_ranks(settings.rank, steps), **scale, **common)
    return peft.LoraConfig(**lora_fields(settings), **common)


def lora_fields(settings: TrainSettings) -> dict[str, Any]:
    """The fields of peft's `LoraConfig` that say the method; without those that say the modules."""
    fields: dict[str, Any] = {"r": settings.rank, "lora_alpha": whole(settings.alpha)}
    # Delta-LoRA's paper has no dropout: what it drops would not reach the base's share.
    fields["lora_dropout"] = 0.0 if settings.adapter == "deltalora" else settings.dropout
    fields |= _FLAGS.get(settings.adapter, {})
    init = "pissa" if settings.adapter == "pissa" else settings.init
    if init != "default":
        fields["init_lora_weights"] = _PISSA if init == "pissa" else init
    return fields


def adalora_ranks(rank: int, steps: int) -> dict[str, int]:
    """AdaLoRA's plan: it begins with half more, and is cut down from the first tenth to the last third."""
    first, last = steps // 10, steps // 3
    return {
        "init_r": first_rank(rank),
        "target_r": rank,
        "tinit": first,
        "tfinal": last,
        "deltaT": max(1, steps // 100),
        "total_step": max(steps, first + last + 1),
    }


def first_rank(rank: int) -> int:
    """The rank that AdaLoRA begins with: half more than it ends with."""
    return math.ceil(1.5 * rank)


def _plain(settings: TrainSettings, targets: Targets, seed: int, common: dict[str, Any]) -> Any:
    """The configuration of a method that peft does all of."""
    import peft

    rank, alpha, dropout = settings.rank, whole(settings.alpha), settings.dropout
    match settings.adapter:
        case "randlora":
            common |= {"r": rank, "randlora_alpha": alpha, "randlora_dropout": dropout}
            # Its projections are as large as a layer, and shared by all: they are drawn again when it loads.
            with quiet_peft():
                return peft.RandLoraConfig(projection_prng_key=seed, save_projection=False, **common)
        case "shira":
            return peft.ShiraConfig(r=rank, random_seed=seed, **common)
        case "loha":
            return peft.LoHaConfig(r=rank, alpha=alpha, **common)
        case "lokr":
            return peft.LoKrConfig(r=rank, alpha=alpha, **common)
        case "miss":
            return peft.MissConfig(r=rank, miss_dropout=dropout, **common)
        case "oft":
            return peft.OFTConfig(oft_block_size=rank, **common)
        case "fourierft":
            smallest = min(math.prod(shape) for shape in targets.modules(settings).values())
            return peft.FourierFTConfig(
                n_frequency=min(1000, smallest), random_loc_seed=seed, init_weights=True, **common
            )
    return peft.VBLoRAConfig(
        r=rank, vector_length=vector_length(targets, settings), vblora_dropout=dropout, **common
    )


def vector_length(targets: Targets, settings: TrainSettings) -> int:
    """The longest vectors of VB-LoRA's bank that every side of every module is a multiple of."""
    sides = math.gcd(*(side for shape in targets.modules(settings).values() for side in shape))
    return max(n for n in range(1, _LONGEST_VECTOR + 1) if sides % n == 0)


def whole(value: float) -> float | int:
    """An int where that is exact, as peft's own files have it."""
    return int(value) if value == int(value) else value
