"""peft's adapters on the resident model: put on, taken off without a trace, and saved.

An adapter wraps modules. The base model's parameters stay the tensors that they were, in the memory that they
had: PiSSA, which replaces weights by what its factors leave of them, has them put back.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from llmevo.errors import GenomeError
from llmevo.genome.train import TARGETS, TrainSettings, TrainSpec, values_of

if TYPE_CHECKING:
    import torch

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn|experts|moe", re.IGNORECASE)
_LAYER = re.compile(r"\.(\d+)\.")
_PISSA = "pissa_niter_16"  # the randomised SVD: minutes less than the full one, and as good a start


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """The linear modules inside the model's layers, by name, with their inputs and outputs."""
    import torch
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.named_modules():
        if not _LAYER.search(name):
            continue
        if isinstance(module, torch.nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's, with its weight transposed
            found[name] = (module.nx, module.nf)
    return found


def layer_of(name: str) -> int:
    """The number of the layer that a module is in."""
    match = _LAYER.search(name)
    assert match is not None
    return int(match[1])


@final
class Targets:
    """Which modules of a model a setting of `target_modules` and `layers` means.

    Args:
        model: A transformers model without adapters.

    Attributes:
        layers: How many there are.
        transposed: Whether the modules hold their weights transposed, as GPT-2's do.

    Raises:
        GenomeError: It has no linear modules in numbered layers.
    """

    def __init__(self, model: Any) -> None:
        self._linear = linear_layers(model)
        if not self._linear:
            raise GenomeError(
                "`train` needs a model with linear modules in numbered layers, and it has none."
            )
        self.layers = 1 + max(map(layer_of, self._linear))
        kinds = {type(model.get_submodule(name)).__name__ for name in self._linear}
        self.transposed = kinds == {"Conv1D"}

    def modules(self, settings: TrainSettings) -> dict[str, tuple[int, int]]:
        """The modules by full name, with their inputs and outputs.

        Raises:
            GenomeError: Nothing matches, or there are fewer layers than asked for.
        """
        if settings.layers is not None and settings.layers > self.layers:
            raise GenomeError(
                f"`train.layers` must be <= {self.layers}, the model's layers, but got {settings.layers}."
            )
        first = self.layers - (settings.layers or self.layers)
        names = self._of_kind(settings.target_modules)
        return {name: self._linear[name] for name in names if layer_of(name) >= first}

    def suffixes(self, settings: TrainSettings) -> list[str]:
        """The shortest ends of module names that mean the targets in all layers and nothing else."""
        chosen = set(self._of_kind(settings.target_modules))
        found = set()
        for name in chosen:
            parts = name.split(".")
            for count in range(1, len(parts) + 1):
                end = ".".join(parts[-count:])
                if all(other in chosen for other in self._linear if f".{other}".endswith(f".{end}")):
                    found.add(end)
                    break
        return sorted(found)

    def _of_kind(self, target: str | tuple[str, ...]) -> list[str]:
        if isinstance(target, str):
            pattern = {"attn": _ATTENTION, "mlp": _MLP}.get(target)
            names = [n for n in self._linear if pattern is None or pattern.search(n.rpartition(".")[0])]
            missing = [] if names else [target]
        else:
            ends = tuple(f".{end}" for end in target)
            names = [name for name in self._linear if f".{name}".endswith(ends)]
            missing = [end for end in target if not any(f".{n}".endswith(f".{end}") for n in self._linear)]
        if missing:
            known = sorted({name.rpartition(".")[2] for name in self._linear})
            raise GenomeError(
                f"`train.target_modules` must match linear modules of the model, but {missing[0]!r} matches "
                f"none; name some of {', '.join(known)}, or one of {', '.join(TARGETS)}."
            )
        return names

    def check(self, spec: TrainSpec) -> None:
        """Check everything that the genes may choose, before anything is spent.

        Raises:
            GenomeError: A target matches nothing, or a rank is larger than a layer.
        """
        depth = [value for value in values_of(spec.layers) if value is not None]
        for target in values_of(spec.target_modules):
            chosen = tuple(target) if isinstance(target, list) else target
            settings = TrainSettings(target_modules=chosen, layers=max(depth) if depth else None)
            modules = self.modules(settings)
            if set(values_of(spec.adapter)) <= {"ia3", "vera"}:  # no rank, and one that may be any
                continue
            rank = max(values_of(spec.rank))
            if "adalora" in values_of(spec.adapter):
                rank = _first_rank(rank)
            name, shape = min(modules.items(), key=lambda item: min(item[1]))
            if rank > min(shape):
                raise GenomeError(
                    f"`train.rank` must be <= {min(shape)}, the smaller side of `{name}` {list(shape)}, but "
                    f"may be {rank}; lower it, or leave that module out of `train.target_modules`."
                )


def config(settings: TrainSettings, targets: Targets, seed: int, steps: int) -> Any:
    """The configuration for peft.

    Args:
        settings: The hyperparameters.
        targets: Of the model.
        seed: Of VeRA's shared projections.
        steps: Optimizer steps of the training, over which AdaLoRA plans its ranks.
    """
    import peft

    names = targets.suffixes(settings)
    first = targets.layers - (settings.layers or targets.layers)
    chosen = None if first == 0 else list(range(first, targets.layers))
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "fan_in_fan_out": targets.transposed}
    if settings.adapter == "ia3":
        # IA3 has no choice of layers, so the modules have their full names there.
        full = names if chosen is None else sorted(targets.modules(settings))
        ends = tuple(f".{name}" for name in full)
        inside = {n for n in targets.modules(settings) if f".{n}".endswith(ends) and _MLP.search(n)}
        forward = [name for name in full if any(f".{n}".endswith(f".{name}") for n in inside)]
        return peft.IA3Config(target_modules=full, feedforward_modules=forward, **common)
    common |= {"target_modules": names, "layers_to_transform": chosen}
    if settings.adapter == "vera":
        return peft.VeraConfig(
            r=settings.rank, vera_dropout=settings.dropout, projection_prng_key=seed, **common
        )
    common |= {"lora_alpha": _whole(settings.alpha), "lora_dropout": settings.dropout}
    if settings.adapter == "adalora":
        # Cut down between the first tenth and the last third of the steps.
        first_cut, last = steps // 10, steps // 3
        return peft.AdaLoraConfig(
            init_r=_first_rank(settings.rank),
            target_r=settings.rank,
            tinit=first_cut,
            tfinal=last,
            deltaT=max(1, steps // 100),
            total_step=max(steps, first_cut + last + 1),
            **common,
        )
    if settings.adapter == "rslora":
        common["use_rslora"] = True
    if settings.adapter == "dora":
        common["use_dora"] = True
    if settings.adapter == "pissa":
        common["init_lora_weights"] = _PISSA
    return peft.LoraConfig(r=settings.rank, **common)


def _first_rank(rank: int) -> int:
    """The rank that AdaLoRA begins with: half more than it ends with."""
    return math.ceil(1.5 * rank)


def _whole(value: float) -> float | int:
    """An int where that is exact, as peft's own files have it."""
    return int(value) if value == int(value) else value


@final
class Adapter:
    """An adapter that is on the model.

    Args:
        peft_model: peft's model around the resident one.
        name: The adapter's name there.
        settings: What it was made from.
    """

    def __init__(self, peft_model: Any, name: str, settings: TrainSettings) -> None:
        self._peft = peft_model
        self.name = name
        self.settings = settings
        if settings.adapter == "lorafa":
            for key, parameter in peft_model.named_parameters():
                if ".lora_A." in key:
                    parameter.requires_grad_(False)
        self._start = self._factors() if settings.adapter == "pissa" else {}

    @property
    def tuner(self) -> Any:
        """The tuner of peft, for the methods that have steps of their own."""
        return self._peft.base_model

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by name without the adapter's."""
        return {
            name.replace(f".{self.name}", ""): parameter
            for name, parameter in self._peft.named_parameters()
            if parameter.requires_grad
        }

    def _factors(self) -> dict[str, torch.Tensor]:
        state = self._state()
        return {key: tensor.clone() for key, tensor in state.items() if ".lora_" in key}

    def _state(self) -> dict[str, torch.Tensor]:
        from peft import get_peft_model_state_dict

        state: dict[str, torch.Tensor] = get_peft_model_state_dict(
            self._peft, adapter_name=self.name, save_embedding_layers=False
        )
        return state

    def _folded(self) -> dict[str, torch.Tensor]:
        """AdaLoRA's factors with its singular values and scale in A: those of a LoRA of scale 1."""
        state = {}
        for key, module in self._peft.named_modules():
            if hasattr(module, "lora_E") and self.name in module.lora_E:
                scale = module.scaling[self.name] / (module.ranknum[self.name] + 1e-5)
                state[f"{key}.lora_A.weight"] = module.lora_A[self.name] * module.lora_E[self.name] * scale
                state[f"{key}.lora_B.weight"] = module.lora_B[self.name]
        return state

    def save(self, folder: Path) -> int:
        """Write `adapter_config.json` and `adapter_model.safetensors`, which plain peft loads.

        PiSSA and AdaLoRA are written as the LoRAs that they are on the untouched base: the one with twice the
        rank, BA less the B0A0 that it took from the weights, the other with its singular values in A.

        Returns:
            Bytes of the weights.
        """
        import peft
        from safetensors.torch import save_file

        written = copy.copy(self._peft.peft_config[self.name])
        state = self._folded() if self.settings.adapter == "adalora" else self._state()
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
        if self.settings.adapter == "adalora":
            written = peft.LoraConfig(
                r=written.init_r,
                lora_alpha=written.init_r,
                lora_dropout=written.lora_dropout,
                target_modules=written.target_modules,
                layers_to_transform=written.layers_to_transform,
                fan_in_fan_out=written.fan_in_fan_out,
                task_type=written.task_type,
                base_model_name_or_path=written.base_model_name_or_path,
            )
        if self.settings.adapter == "pissa":
            state = _difference(state, self._start)
            written.r, written.lora_alpha = 2 * written.r, 2 * written.lora_alpha
            written.init_lora_weights = True
        written.inference_mode = True
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        written.save_pretrained(str(folder))
        return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _difference(now: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Factors of BA - B0A0: the As one below the other, the Bs side by side."""
    import torch

    found = {}
    for key, tensor in now.items():
        first = start[key].cpu()
        found[key] = (
            torch.cat([tensor, first]) if ".lora_A." in key else torch.cat([tensor, -first], dim=1)
        ).contiguous()
    return found


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep a warning from the user that is meant for peft: 0.21 reads what transformers 5.23 deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextmanager
def adapted(model: Any, settings: TrainSettings, peft_config: Any, name: str, seed: int) -> Iterator[Adapter]:
    """Put an adapter on the model for the length of a `with` block.

    Args:
        model: The resident model; the adapter computes wherever the model is called.
        settings: The hyperparameters.
        peft_config: From `config`.
        name: The adapter's name, such as `cand0007`.
        seed: Of the adapter's first weights. torch's random state is left as it was.
    """
    import torch
    from peft import get_peft_model

    before = {parameter: parameter.data for parameter in model.parameters()}
    wanted = {parameter: parameter.requires_grad for parameter in before}
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), quiet_peft():
            torch.manual_seed(seed)
            wrapped = get_peft_model(model, peft_config, adapter_name=name)
        yield Adapter(wrapped, name, settings)
    finally:
        _unwrap(model)
        with torch.no_grad():
            for parameter, data in before.items():
                if parameter.data_ptr() != data.data_ptr():
                    parameter.data = data
                parameter.requires_grad_(wanted[parameter])
                parameter.grad = None
        model.eval()


@contextmanager
def loaded(model: Any, folder: Path, name: str) -> Iterator[None]:
    """Put a saved adapter on the model for the length of a `with` block."""
    from peft import PeftModel

    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with quiet_peft():
            PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        model.eval()
        yield
    finally:
        _unwrap(model)
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def _unwrap(model: Any) -> None:
    """Put every module back that an adapter wraps, also where the wrapping broke off half-way."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
