"""The change that an adapter makes, as a product of two thin matrices: summed, cut to a rank, sketched.

A LoRA adds BA to a weight, times its scale. The factors mean nothing alone: BA = (BG)(G^-1 A) for every
invertible G. So everything here is of the product, and never of A and B apart; and nothing has the size of
the weight.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    import torch

SKETCH = 8  # rows and columns of a sketch


@final
@dataclass(frozen=True, slots=True)
class Product:
    """The matrix `up @ down`.

    Args:
        up: Shape (outputs, rank); a LoRA's B times its scale.
        down: Shape (rank, inputs); a LoRA's A.
    """

    up: torch.Tensor
    down: torch.Tensor

    @property
    def rank(self) -> int:
        """Columns of `up`; the rank of the matrix is no higher."""
        return int(self.down.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix: (outputs, inputs)."""
        return int(self.up.shape[0]), int(self.down.shape[1])


def weighted_sum(terms: Sequence[tuple[float, Product]]) -> Product:
    """The sum of weight times product, exactly: the factors side by side, the ranks added up.

    Args:
        terms: At least one; all of one shape. Weights may be negative.
    """
    import torch

    return Product(
        torch.cat([weight * product.up for weight, product in terms], dim=1),
        torch.cat([product.down for _, product in terms]),
    )


def truncated(product: Product, rank: int) -> tuple[Product, float]:
    """The nearest matrix of a rank, in the Frobenius norm (Eckart and Young, 1936).

    QR of both factors leaves a small matrix of the present rank, whose singular values are the product's. So
    this costs what the factors cost; the dense matrix is never formed.

    Args:
        product: What to approximate; it comes back, but for rounding, if `rank` is no less than its own.
        rank: At least 1.

    Returns:
        The product with orthonormal rows of `down`, the singular values in `up`, and no higher rank than the
        shape has; and what was cut off: the norm of the difference over that of `product` (0 to 1).
    """
    import torch

    left, small_left = torch.linalg.qr(product.up)
    right, small_right = torch.linalg.qr(product.down.T)
    u, values, v = torch.linalg.svd(small_left @ small_right.T, full_matrices=False)
    kept = min(rank, len(values))
    total = float(values.square().sum())
    lost = math.sqrt(float(values[kept:].square().sum()) / total) if total else 0.0
    return Product(left @ (u[:, :kept] * values[:kept]), v[:kept] @ right.T), lost


def sketch(products: Mapping[str, Product], seed: int, size: int = SKETCH) -> torch.Tensor:
    """A few numbers that say where an adapter is among others: the sum over its modules of `P^T B A Q`.

    P and Q are normal with variance 1 / size, and follow from the seed and the module's name. The sketch is
    linear in BA, so that equal changes have equal sketches whatever their factors are, and the squared
    distance of two sketches is on average that of the changes (Johnson and Lindenstrauss, 1984; for matrices
    from both sides: Clarkson and Woodruff, STOC 2009).

    Args:
        products: By module.
        seed: Sketches of one seed can be compared.
        size: More is more precise.

    Returns:
        float64, shape (size, size).
    """
    import torch

    total = torch.zeros(size, size, dtype=torch.float64)
    for name, product in products.items():
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        sides = [torch.randn(length, size, generator=generator) for length in product.shape]
        left, right = (side.to(product.up) for side in sides)
        total += (((left.T @ product.up) @ (product.down @ right)) / size).double().cpu()
    return total
