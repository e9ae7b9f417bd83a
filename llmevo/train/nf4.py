"""QLoRA's base: the resident weights as NF4 with double quantisation, for the length of a trial.

Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314; bitsandbytes computes it.
The linear modules of all layers are swapped for 4-bit ones, whatever the adapter's targets are: that is the
model that `BitsAndBytesConfig(load_in_4bit=True)` makes for who uses the adapter, GPT-2's and T5's too. The
float modules are put aside and come back untouched, so that a trial takes the memory of the 4-bit weights
more, not less.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llmevo.errors import GenomeError
from llmevo.genome.train import TrainSpec, values_of
from llmevo.train.targets import linear_layers

if TYPE_CHECKING:
    import torch

_BLOCK = 64  # weights that share a scale, itself of 8 bits
_BLOCK_OF_SCALES = 256  # scales that share a scale of 32 bits


def check(spec: TrainSpec) -> None:
    """See that bitsandbytes is installed, if a method of the genome needs it.

    Raises:
        GenomeError: It is not.
    """
    if "qlora" in values_of(spec.adapter) and importlib.util.find_spec("bitsandbytes") is None:
        raise GenomeError(
            "`train.adapter: qlora` needs the package bitsandbytes, which is not installed: "
            'pip install "llmevo[qlora]"'
        )


def size(elements: int) -> int:
    """Bytes that so many weights take as NF4 with double quantisation."""
    scales = -(-elements // _BLOCK)
    return -(-elements // 2) + scales + 4 * -(-scales // _BLOCK_OF_SCALES)


def modules(model: Any) -> list[str]:
    """The names of the modules that a user's 4-bit model has in 4 bits.

    All linear ones in layers, but those that the architecture keeps in float: T5's `wo`, whose own forward
    pass casts its input to the type of its weights.
    """
    kept = tuple(model._keep_in_fp32_modules or ())
    return [name for name in linear_layers(model) if not name.endswith(kept)]


@contextmanager
def quantised(model: Any, names: list[str]) -> Iterator[None]:
    """Swap modules for 4-bit ones made from their weights, and back.

    Args:
        model: The resident model.
        names: Its linear modules; those of GPT-2, which hold their weights transposed, become usual ones.
    """
    aside = {name: model.get_submodule(name) for name in names}
    try:
        for name, module in aside.items():
            model.set_submodule(name, _quantise(module))
        model.is_loaded_in_4bit = True  # peft asks for it
        yield
    finally:
        for name, module in aside.items():
            model.set_submodule(name, module)
        vars(model).pop("is_loaded_in_4bit", None)


def _quantise(module: Any) -> Any:
    """A module's 4-bit twin, frozen."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = _usual(module)
    with torch.device("meta"):
        twin = Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=module.bias is not None,
            compute_dtype=weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
        )
    kind = {"requires_grad": False, "compress_statistics": True, "quant_type": "nf4", "module": twin}
    twin.weight = Params4bit(weight.data, **kind).to(weight.device)
    if module.bias is not None:
        twin.bias = module.bias
    # The first evaluation on a CPU with AVX512-BF16 would repack the weights, for a kernel that rounds to
    # bfloat16 and has no backward pass.
    twin.support_avx512bf16_for_cpu = False
    return twin.requires_grad_(False).train(module.training)


def _usual(module: Any) -> torch.Tensor:
    """A linear module's weights, shape (outputs, inputs)."""
    weight: torch.Tensor = module.weight
    return weight.T.contiguous() if hasattr(module, "nf") else weight


def round_trip(module: Any) -> torch.Tensor:
    """What NF4 leaves of a linear module's weights, in their own shape and dtype."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = _usual(module)
    kept: torch.Tensor = dequantize_4bit(*quantize_4bit(weight, compress_statistics=True, quant_type="nf4"))
    return kept.T.contiguous() if hasattr(module, "nf") else kept


@contextmanager
def not_paged() -> Iterator[None]:
    """Keep bitsandbytes' warning about paging from the user: the run's facts say it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU", UserWarning)
        yield
