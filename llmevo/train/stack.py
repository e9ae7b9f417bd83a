"""LoRAs of several candidates on one frozen base, stacked along a leading axis.

The rows of a batch belong to one candidate after the other. The base's products run over all rows at once,
the factors' as batched products, and nothing of one candidate touches another: the sum of their losses has
each one's own gradients. Factors of smaller ranks are padded with zeros, whose gradients are zero.
mLoRA, arXiv 2312.02515, trains several adapters on one base too, with other means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, final

import torch
from peft.tuners.lora import LoraLayer

from llmevo.train.quick import product

Side: TypeAlias = Literal["A", "B"]

_Key: TypeAlias = tuple[str, Side]

SIDES: tuple[Side, Side] = ("A", "B")


@final
@dataclass(frozen=True, slots=True)
class Factor:
    """One trained matrix with AdamW's moments, all of shape (rank, inputs) for A or (outputs, rank) for B."""

    weight: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor


@final
@dataclass(frozen=True, slots=True)
class State:
    """A candidate between two steps.

    Args:
        factors: By module and side.
        scales: What BA is multiplied by, by module.
        losses: Of the steps that are done.
    """

    factors: dict[_Key, Factor]
    scales: dict[str, float]
    losses: list[float] = field(default_factory=list)


def read(model: Any, name: str, optimizer: torch.optim.Optimizer, losses: Sequence[float]) -> State:
    """The state of a candidate that is on the model as peft's LoRA, as copies.

    Args:
        model: The resident model.
        name: The adapter's.
        optimizer: AdamW over its parameters.
        losses: Of the steps that are done.
    """
    factors: dict[_Key, Factor] = {}
    scales = {}
    for module, layer in _layers(model):
        scales[module] = float(layer.scaling[name])
        for side, held in zip(SIDES, (layer.lora_A, layer.lora_B), strict=True):
            weight = held[name].weight
            known = optimizer.state.get(weight, {})
            moments = [known.get(key, torch.zeros_like(weight)) for key in ("exp_avg", "exp_avg_sq")]
            factors[module, side] = Factor(*(tensor.detach().clone() for tensor in (weight, *moments)))
    return State(factors, scales, list(losses))


def write(state: State, model: Any, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put a state into peft's LoRA on the model, and AdamW's moments into the optimizer."""
    trained = set() if optimizer is None else {p for g in optimizer.param_groups for p in g["params"]}
    for module, layer in _layers(model):
        for side, held in zip(SIDES, (layer.lora_A, layer.lora_B), strict=True):
            weight, factor = held[name].weight, state.factors[module, side]
            weight.data.copy_(factor.weight)
            if optimizer is not None and weight in trained and state.losses:
                optimizer.state[weight] = {
                    "step": torch.tensor(float(len(state.losses)), device=weight.device),
                    "exp_avg": factor.mean.clone(),
                    "exp_avg_sq": factor.square.clone(),
                }


def _layers(model: Any) -> list[tuple[str, Any]]:
    """The modules that peft's LoRA wraps, with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


@final
class Rows:
    """Whose rows the next forward pass has.

    Attributes:
        counts: Tokens of each candidate, fillings included; one candidate's follow the other's. Empty while
            the rows are nobody's, and the base computes alone.
    """

    def __init__(self) -> None:
        self.counts: tuple[int, ...] = ()


@final
class StackedLinear(torch.nn.Module):
    """A frozen linear module with a LoRA for each candidate.

    Args:
        base: The module.
        rows: Says which rows are whose.
        a: Shape (candidates, rank, inputs).
        b: Shape (candidates, outputs, rank).
        scales: One for each candidate.
    """

    def __init__(
        self,
        base: torch.nn.Module,
        rows: Rows,
        a: torch.nn.Parameter,
        b: torch.nn.Parameter,
        scales: Sequence[float],
    ) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = a, b
        self._rows, self._scales = rows, scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Base and LoRA of `x`, shape (rows, width, inputs)."""
        counts = self._rows.counts
        return product(x, self.base, self.a, self.b, self._scales, counts) if counts else self.base(x)


@final
class Stack:
    """The stacked factors of several candidates; row `k` of each is candidate `k`'s.

    Args:
        states: One for each candidate; their modules, ranks and scales may differ.
        ratios: For each candidate, by what its learning rate is multiplied for its As and for its Bs; 0 for a
            side that is not trained.
        decays: AdamW's weight decay of each candidate.

    Attributes:
        rows: To be told the rows of each forward pass.
    """

    def __init__(
        self, states: Sequence[State], ratios: Sequence[tuple[float, float]], decays: Sequence[float]
    ) -> None:
        self.rows = Rows()
        self._scales = [state.scales for state in states]
        self._shapes = [{key: f.weight.shape for key, f in state.factors.items()} for state in states]
        self._weights: dict[_Key, torch.nn.Parameter] = {}
        self._moments: dict[_Key, tuple[torch.Tensor, torch.Tensor]] = {}
        for key, shape in _padded(self._shapes).items():
            blocks = [_block([_part(state, key, kind) for state in states], shape) for kind in range(3)]
            self._weights[key] = torch.nn.Parameter(blocks[0])
            self._weights[key].grad = torch.zeros_like(blocks[0])
            self._moments[key] = (blocks[1], blocks[2])
        self._optimizers = [
            self._optimizer(row, dict(zip(SIDES, ratios[row], strict=True)), decays[row], len(state.losses))
            for row, state in enumerate(states)
        ]

    def _optimizer(self, row: int, ratios: dict[Side, float], decay: float, done: int) -> torch.optim.AdamW:
        """AdamW over one candidate's rows, which are where the stacked factors and their gradients are."""
        groups: dict[float, list[torch.nn.Parameter]] = {}
        moments = {}
        for key, weight in self._weights.items():
            ratio = ratios[key[1]]
            if not ratio or key not in self._shapes[row]:
                continue
            assert weight.grad is not None
            own = torch.nn.Parameter(weight.detach()[row])
            own.grad = weight.grad[row]
            groups.setdefault(ratio, []).append(own)
            mean, square = self._moments[key]
            step = torch.tensor(float(done), device=own.device)
            moments[own] = {"step": step, "exp_avg": mean[row], "exp_avg_sq": square[row]}
        listed = [{"params": members, "ratio": ratio} for ratio, members in groups.items()]
        optimizer = torch.optim.AdamW(listed, weight_decay=decay, fused=True)
        for own, known in moments.items():
            optimizer.state[own] = known
        return optimizer

    def zero_gradients(self) -> None:
        """Forget all gradients."""
        torch._foreach_zero_([weight.grad for weight in self._weights.values() if weight.grad is not None])

    def step(self, row: int, rate: float, clip: float) -> None:
        """One step of one candidate.

        Args:
            row: Which.
            rate: The learning rate, before the candidate's ratios.
            clip: Largest norm of its gradient; 0 for no limit.
        """
        optimizer = self._optimizers[row]
        if clip > 0:
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        optimizer.step()

    def state(self, row: int, losses: Sequence[float]) -> State:
        """A candidate's state, as copies, without the padding.

        Args:
            row: Which.
            losses: Of the steps that it has done.
        """
        factors = {}
        for key, (first, second) in self._shapes[row].items():
            blocks = (self._weights[key].detach(), *self._moments[key])
            factors[key] = Factor(*(block[row, :first, :second].clone() for block in blocks))
        return State(factors, self._scales[row], list(losses))

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Put the factors on the model for the length of a `with` block; its parameters stay as they are."""
        wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
        modules = {module: model.get_submodule(module) for module, side in self._weights if side == "A"}
        try:
            model.requires_grad_(False)
            for module, base in modules.items():
                a, b = self._weights[module, "A"], self._weights[module, "B"]
                scales = [scales.get(module, 0.0) for scales in self._scales]
                _put(model, module, StackedLinear(base, self.rows, a, b, scales))
            yield
        finally:
            for module, base in modules.items():
                _put(model, module, base)
            for parameter, before in wanted.items():
                parameter.requires_grad_(before)


def _padded(own: Sequence[dict[_Key, torch.Size]]) -> dict[_Key, tuple[int, int]]:
    """Shapes that hold every candidate's factors."""
    found: dict[_Key, tuple[int, int]] = {}
    for shapes in own:
        for key, (first, second) in shapes.items():
            known = found.get(key, (0, 0))
            found[key] = (max(known[0], first), max(known[1], second))
    return found


def _part(state: State, key: _Key, kind: int) -> torch.Tensor | None:
    """A candidate's weight (0), mean (1) or square (2) of a factor; None if it has no such factor."""
    factor = state.factors.get(key)
    return None if factor is None else (factor.weight, factor.mean, factor.square)[kind]


def _block(parts: Sequence[torch.Tensor | None], shape: tuple[int, int]) -> torch.Tensor:
    """The parts one behind the other, each filled up with zeros to `shape`."""
    sample = next(part for part in parts if part is not None)
    block = sample.new_zeros(len(parts), *shape)
    for row, part in zip(block, parts, strict=True):
        if part is not None:
            row[: part.shape[0], : part.shape[1]] = part
    return block


def _put(model: Any, name: str, module: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
