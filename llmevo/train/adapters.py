"""peft's adapters on the resident model: put on, taken off without a trace, and saved.

An adapter wraps modules. The base model's parameters stay the tensors that they were, in the memory that they
had: PiSSA, which replaces weights by what its factors leave of them, has them put back.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from llmevo.genome.train import TrainSettings
from llmevo.train import nf4, ranks
from llmevo.train.delta import Delta
from llmevo.train.targets import Targets as Targets
from llmevo.train.targets import linear_layers as linear_layers

if TYPE_CHECKING:
    import torch


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

    peft 0.21 reads what transformers 5.23 deprecates; RandLoRA's projections follow from their seed; QLoRA's
    adapter, trained on 4-bit modules, is as right on GPT-2's, which hold their weights the other way round.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target", UserWarning)
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
    names = nf4.modules(model) if settings.adapter == "qlora" else []
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
