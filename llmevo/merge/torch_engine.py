"""The merge's arithmetic in torch's operations, on any device and for any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

from llmevo.merge.layout import Arena, Slot
from llmevo.merge.works import Mask, Masked, Product, Sum, Work, output, pieces

if TYPE_CHECKING:
    import torch

_U32 = 0xFFFFFFFF


@final
class TorchEngine:
    """The arithmetic of the compiled kernels, a block at a time.

    Args:
        arena: The buffers.
        block: Elements at a time, which bounds the temporaries: a few float32 and int64 of this size.
    """

    name = "torch"

    def __init__(self, arena: Arena, block: int = 1 << 22) -> None:
        self._arena = arena
        self._block = block

    def run(self, works: Sequence[Work]) -> list[int]:
        """As `Engine.run`."""
        import torch

        flags = [self.merge(work) for work in works]
        if not flags:
            return []
        return [i for i, finite in enumerate(torch.stack(flags).tolist()) if not finite]

    def histogram(self, base: Slot, source: Slot, within: int | None = None) -> Any:
        """As `Engine.histogram`."""
        import torch

        delta = self._delta(self._view(base).float(), self._view(source))
        bits = delta.abs().view(torch.int32)
        if within is None:
            return torch.bincount(bits >> 16, minlength=1 << 15).cpu().numpy()
        return torch.bincount(bits[bits >> 16 == within] & 0xFFFF, minlength=1 << 16).cpu().numpy()

    def mass_by_noise(self, base: Slot, source: Slot, key: tuple[int, int], buckets: int) -> Any:
        """As `Engine.mass_by_noise`."""
        import torch

        delta = self._delta(self._view(base).float(), self._view(source)).abs().double()
        shift = 32 - (buckets.bit_length() - 1)
        places = noise(0, delta.numel(), key, delta.device) >> shift
        return torch.bincount(places, weights=delta, minlength=buckets).cpu().numpy()

    def kept_mass(self, base: Slot, source: Slot, mask: Mask) -> float:
        """As `Engine.kept_mass`."""
        delta = self._delta(self._view(base).float(), self._view(source))
        return float(self._kept(delta, mask, 0).abs().double().sum())

    def merge(self, work: Work) -> torch.Tensor:
        """Do one piece of work; return whether all of the result is finite, as a tensor."""
        import torch

        finite: torch.Tensor | None = None
        like = work.sum if isinstance(work, Product) else work
        precision = self._view(like.sources[0]).dtype
        for part in pieces(work, self._block):
            out = self._view(output(part))
            value = self._value(part)
            # Rounded once to the coarser of the sources and the output.
            out.copy_(value.to(precision) if out.dtype == torch.float32 else value)
            here = torch.isfinite(out).all()
            finite = here if finite is None else finite & here
        return torch.tensor(True) if finite is None else finite

    def _value(self, work: Work) -> torch.Tensor:
        """The result in float32."""
        if isinstance(work, Masked):
            return self._masked(work)
        return self._sum(work) if isinstance(work, Sum) else self._product(work)

    def _product(self, work: Product) -> torch.Tensor:
        total = self._sum(work.sum).view(-1, work.columns)
        for term in work.terms:
            up = self._view(term.up).view(-1, term.rank)
            total.addmm_(up, self._view(term.down).view(term.rank, -1), alpha=term.weight)
        return total.view(-1)

    def _sum(self, work: Sum) -> torch.Tensor:
        sources = [self._view(slot) for slot in work.sources]
        if work.base is None:
            total = sources[0].float() * work.weights[0]
            for source, weight in zip(sources[1:], work.weights[1:], strict=True):
                total.add_(source.float(), alpha=weight)
            return total
        base = self._view(work.base).float()
        step = self._delta(base, sources[0]).mul_(work.weights[0])
        for source, weight in zip(sources[1:], work.weights[1:], strict=True):
            step.add_(self._delta(base, source), alpha=weight)
        return step.add_(base)

    def _masked(self, work: Masked) -> torch.Tensor:
        import torch

        base = self._view(work.base).float()
        dtype = self._view(work.base).dtype
        parts = []
        for slot, mask, weight in zip(work.sources, work.masks, work.weights, strict=True):
            delta = self._kept(self._delta(base, self._view(slot)), mask, work.first)
            if mask.scale != 1:
                delta = (delta * mask.scale).to(dtype).float()
            parts.append((delta * weight).to(dtype).float())
        total = torch.stack(parts).sum(0)
        divisor = torch.tensor(work.weights).sum().to(dtype).float().to(base.device)
        if work.elect:
            sign = torch.where(total >= 0, 1.0, -1.0)
            same = [part * sign > 0 for part in parts]
            total = torch.stack([part * keep for part, keep in zip(parts, same, strict=True)]).sum(0)
            counted = [keep * weight for keep, weight in zip(same, work.weights, strict=True)]
            divisor = torch.stack(counted).sum(0)
            divisor = torch.where(divisor == 0, 1.0, divisor)
        elif abs(float(divisor)) < 1e-8:
            divisor = torch.ones_like(divisor)
        if work.normalize:
            total = total / divisor
        return base + total * work.factor

    def _kept(self, delta: torch.Tensor, mask: Mask, first: int) -> torch.Tensor:
        import torch

        if mask.kind == "window":
            bits = delta.abs().view(torch.int32).long()
            return delta * ((bits >= mask.low) & (bits <= mask.high))
        bits = noise(first, delta.numel(), mask.key, delta.device)
        if mask.ranks is None:
            return delta * (bits < mask.high)
        return delta * (bits < mask.low + self._view(mask.ranks).long() * mask.high)

    def _delta(self, base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """The difference from the base (float32), rounded as the source is."""
        return (source.float() - base).to(source.dtype).float()

    def _view(self, slot: Slot) -> torch.Tensor:
        return self._arena.buffers[slot.buffer][slot.start : slot.stop]


def noise(first: int, size: int, key: tuple[int, int], device: Any) -> torch.Tensor:
    """Return 32 random bits for each counter from `first` on, as int64: those of `cells.noise`."""
    import torch

    bits = torch.arange(first, first + size, device=device) & _U32
    bits = bits ^ key[0]
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x7FEB352D + key[1]) & _U32
    bits = bits ^ (bits >> 15)
    bits = (bits * 0x846CA68B) & _U32
    return bits ^ (bits >> 16)
