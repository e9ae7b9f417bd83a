"""peft's adapters on the resident model: put on, taken off without a trace, and saved.

An adapter wraps modules. The base model's parameters stay the tensors that they were, in the memory that they
had: PiSSA, which replaces weights by what its factors leave of them, has them put back.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from llmevo.errors import GenomeError
from llmevo.genome.train import TARGETS, TrainSettings
from llmevo.train import nf4, ranks
from llmevo.train.delta import Delta

if TYPE_CHECKING:
    import torch

# peft imports bitsandbytes where it is, for any LoRA; it then logs that it would like another package.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
MLP = re.compile(r"mlp|feed_?forward|ffn|experts|moe|dense\w*dense", re.IGNORECASE)
_LAYER = re.compile(r"\.(\d+)\.")


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


def _stack_of(name: str) -> str:
    """What comes before the layer's number: an encoder's layers and a decoder's have numbers of their own."""
    return _LAYER.split(name, maxsplit=1)[0]


def _task_type(model: Any) -> str:
    if model.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM"


@final
class Targets:
    """Which modules of a model a setting of `target_modules` and `layers` means.

    Args:
        model: A transformers model without adapters.

    Attributes:
        layers: How many there are; of an encoder and a decoder, those of the deeper one.
        transposed: Whether the modules hold their weights transposed, as GPT-2's do.
        task_type: What peft calls what the model does.
        nested: Whether layers hold numbered parts, as T5's do, which peft takes for the layers.

    Raises:
        GenomeError: It has no linear modules in numbered layers.
    """

    def __init__(self, model: Any) -> None:
        self._linear = linear_layers(model)
        if not self._linear:
            raise GenomeError(
                "`train` needs a model with linear modules in numbered layers, and it has none."
            )
        self._depth: dict[str, int] = {}
        for name in self._linear:
            stack = _stack_of(name)
            self._depth[stack] = max(self._depth.get(stack, 0), 1 + layer_of(name))
        self.layers = max(self._depth.values())
        self.task_type = _task_type(model)
        self.nested = any(len(_LAYER.findall(name)) > 1 for name in self._linear)
        kinds = {type(model.get_submodule(name)).__name__ for name in self._linear}
        self.transposed = kinds == {"Conv1D"}

    def modules(self, settings: TrainSettings) -> dict[str, tuple[int, int]]:
        """The modules by full name, with their inputs and outputs.

        Raises:
            GenomeError: Nothing matches, or there are fewer layers than asked for.
        """
        if settings.layers is not None and settings.layers > self.layers:
            raise GenomeError(
                f"`train.layers` must be <= {self.layers}, the model's layers, but may be "
                f"{settings.layers}; lower it."
            )
        last = settings.layers or self.layers
        names = self._of_kind(settings.target_modules)
        return {
            name: self._linear[name]
            for name in names
            if layer_of(name) >= self._depth[_stack_of(name)] - last
        }

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
            pattern = {"attn": _ATTENTION, "mlp": MLP}.get(target)
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
        self._start = self._factors() if settings.starts_from_base else {}
        self._delta = Delta(self.layers(), name, settings) if settings.adapter == "deltalora" else None

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by name without the adapter's."""
        return {
            name.replace(f".{self.name}", ""): parameter
            for name, parameter in self._peft.named_parameters()
            if parameter.requires_grad
        }

    def stepped(self, step: int, steps: int) -> None:
        """Do what the method does after optimizer step `step` of 0 to `steps - 1`, gradients still there."""
        if self.settings.adapter == "adalora":
            self._peft.base_model.update_and_allocate(step)
        if self._delta is not None:
            self._delta.stepped(step, steps)

    def penalty(self) -> torch.Tensor | float:
        """What the method adds to the loss: AdaLoRA keeps its factors near orthonormal.

        The mean of `||P P^T - I||`, times its weight.
        """
        import torch

        if self.settings.adapter != "adalora":
            return 0.0
        terms = []
        for name, factor in self.parameters().items():
            if ".lora_A" in name or ".lora_B" in name:
                square = factor @ factor.T if ".lora_A" in name else factor.T @ factor
                terms.append(torch.linalg.norm(square - torch.eye(len(square), device=square.device)))
        weight: float = self._peft.peft_config[self.name].orth_reg_weight
        return weight * torch.stack(terms).mean()

    def memory(self) -> dict[str, torch.Tensor]:
        """What the method keeps beside its parameters, for a training to go on with."""
        if self.settings.adapter == "adalora":
            return ranks.of(self._peft.base_model, self.name)
        return {} if self._delta is None else self._delta.first

    def remember(self, kept: dict[str, torch.Tensor]) -> None:
        """Go on from what `memory` returned; the parameters have their values of then already."""
        if self.settings.adapter == "adalora":
            ranks.restore(self._peft.base_model, self.name, kept)
        if self._delta is not None:
            self._delta.resume(kept)

    def layers(self) -> dict[str, Any]:
        """The LoRA layers of peft by name."""
        return {key: m for key, m in self._peft.named_modules() if self.name in getattr(m, "lora_A", ())}

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
        from peft.utils import AuxiliaryTrainingWrapper

        state = {}
        for key, module in self._peft.named_modules():
            if hasattr(module, "lora_E") and self.name in module.lora_E:
                scale = module.scaling[self.name] / (module.ranknum[self.name] + 1e-5)
                state[f"{key}.lora_A.weight"] = module.lora_A[self.name] * module.lora_E[self.name] * scale
                state[f"{key}.lora_B.weight"] = module.lora_B[self.name]
            elif isinstance(module, AuxiliaryTrainingWrapper):  # a head
                head = module.modules_to_save[self.name].named_parameters()
                state |= {f"{key}.{part}": parameter for part, parameter in head}
        return state

    def save(self, folder: Path) -> int:
        """Write `adapter_config.json` and `adapter_model.safetensors`, which plain peft loads.

        What moved the base's weights is written as the LoRA that it is on the untouched base, with twice the
        rank: PiSSA and OLoRA as BA less the B0A0 that they took from the weights, Delta-LoRA as
        (1 + lambda) BA less lambda B_K A_K. AdaLoRA has its singular values in A.

        Returns:
            Bytes of the weights.
        """
        from safetensors.torch import save_file

        written = copy.copy(self._peft.peft_config[self.name])
        state = self._folded() if self.settings.adapter == "adalora" else self._state()
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
        if self.settings.adapter == "adalora":
            written = _folded_config(written)
        if self._start:
            state = _sum(state, self._start, 1.0, -1.0)
        if self._delta is not None and self._delta.first:
            first = {f"{key}.weight": factor for key, factor in self._delta.first.items()}
            state = _sum(state, first, 1.0 + self.settings.delta_lambda, -self.settings.delta_lambda)
        if self._start or (self._delta is not None and self._delta.first):
            written.r *= 2
            written.lora_alpha *= math.sqrt(2) if written.use_rslora else 2
            written.init_lora_weights = True
        written.inference_mode = True
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        written.save_pretrained(str(folder))
        return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _folded_config(config: Any) -> Any:
    """The LoRA's that AdaLoRA is saved as."""
    import peft

    kept = (
        "lora_dropout",
        "target_modules",
        "layers_to_transform",
        "fan_in_fan_out",
        "task_type",
        "modules_to_save",
    )
    return peft.LoraConfig(
        r=config.init_r,
        lora_alpha=config.init_r,
        base_model_name_or_path=config.base_model_name_or_path,
        **{name: getattr(config, name) for name in kept},
    )


def _sum(
    now: dict[str, torch.Tensor], first: dict[str, torch.Tensor], share: float, other: float
) -> dict[str, torch.Tensor]:
    """Factors of `share * BA + other * B0A0`: the As one below the other, the Bs side by side."""
    import torch

    found = {}
    for key, tensor in now.items():
        if ".lora_A." in key:
            tensor = torch.cat([tensor, first[key].cpu()])
        elif ".lora_B." in key:
            tensor = torch.cat([share * tensor, other * first[key].cpu()], dim=1)
        found[key] = tensor.contiguous()
    return found


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep warnings from the user that are of no use to him.

    peft 0.21 reads what transformers 5.23 deprecates, and RandLoRA's projections follow from their seed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Specified to not save basis_A and basis_B", UserWarning)
        yield


def _unchecked() -> AbstractContextManager[None]:
    """Say that sparse tensors, SHiRA's, are not to be checked: torch warns where nobody says so."""
    import torch

    check: Any = torch.sparse.check_sparse_tensor_invariants
    unchecked: AbstractContextManager[None] = check(enable=False)
    return unchecked


@contextmanager
def adapted(model: Any, settings: TrainSettings, peft_config: Any, name: str, seed: int) -> Iterator[Adapter]:
    """Put an adapter on the model for the length of a `with` block.

    Args:
        model: The resident model; the adapter computes wherever the model is called.
        settings: The hyperparameters.
        peft_config: From `methods.config`.
        name: The adapter's name, such as `cand0007`.
        seed: Of the adapter's first weights. torch's random state is left as it was.
    """
    import torch
    from peft import get_peft_model

    before = {parameter: parameter.data for parameter in model.parameters()}
    wanted = {parameter: parameter.requires_grad for parameter in before}
    devices = [model.device] if model.device.type == "cuda" else []
    with _quantised(model, settings):
        try:
            if settings.starts_from_base and settings.init == "olora":
                # peft subtracts from float32 weights where they lie.
                for weight in (model.get_submodule(layer).weight for layer in linear_layers(model)):
                    weight.data = weight.data.clone()
            with torch.random.fork_rng(devices=devices), quiet_peft():
                torch.manual_seed(seed)
                wrapped = get_peft_model(model, peft_config, adapter_name=name)
            with _unchecked():
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


def _quantised(model: Any, settings: TrainSettings) -> AbstractContextManager[None]:
    """QLoRA's base in place of the resident one; any other method has that."""
    names = list(linear_layers(model)) if settings.adapter == "qlora" else []
    return nf4.quantised(model, names) if names else nullcontext()


@contextmanager
def loaded(model: Any, folder: Path, name: str, settings: TrainSettings) -> Iterator[None]:
    """Put a saved adapter, trained with `settings`, on the model for the length of a `with` block."""
    from peft import PeftModel

    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with _quantised(model, settings):
        try:
            with quiet_peft():
                PeftModel.from_pretrained(model, str(folder), adapter_name=name)
            model.eval()
            with _unchecked():
                yield
        finally:
            _unwrap(model)
            for parameter, wanted in before.items():
                parameter.requires_grad_(wanted)


def _unwrap(model: Any) -> None:
    """Put every module back that an adapter wraps, also where the wrapping broke off half-way."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, BaseTunerLayer):
            setattr(model.get_submodule(parent), child, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):  # around a head
            setattr(model.get_submodule(parent), child, module.original_module)
    if hasattr(model, "peft_config"):
        del model.peft_config
