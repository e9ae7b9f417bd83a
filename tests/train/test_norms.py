"""A normalisation in one operation is the module's own, in value and gradient, or it is not touched."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from test_forward import small  # noqa: E402

from llmevo.train.norms import quick_norms  # noqa: E402


def norms(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("Norm")]


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("Llama", {}, True),
        ("Qwen2", {}, True),
        ("Gemma", {"head_dim": 8}, False),  # its weight is added to one
        ("GPT2", {}, False),
    ],
)
def test_values_and_gradients_are_the_modules(kind: str, options: dict[str, Any], expected: bool) -> None:
    model = small(kind, **options).requires_grad_(False)
    torch.manual_seed(1)
    for module in norms(model):
        module.weight.data.uniform_(0.5, 2.0)
    x, dy = torch.randn(2, 5, 16), torch.randn(2, 5, 16)

    def found(module: Any) -> tuple[Any, Any]:
        given = x.clone().requires_grad_(True)
        y = module(given)
        return y.detach(), torch.autograd.grad(y, given, dy)[0]

    before = [found(module) for module in norms(model)]
    with quick_norms(model):
        assert all(("forward" in vars(module)) is expected for module in norms(model))
        for module, (y, dx) in zip(norms(model), before, strict=True):
            ours = found(module)
            torch.testing.assert_close(ours[0], y, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(ours[1], dx, atol=1e-5, rtol=1e-5)
    assert not any("forward" in vars(module) for module in norms(model))


def test_one_that_is_trained_or_in_another_precision_keeps_its_own() -> None:
    model = small("Llama").requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    with quick_norms(model):
        assert "forward" not in vars(model.model.norm)
        assert "forward" in vars(model.model.layers[0].input_layernorm)
    with quick_norms(model.bfloat16()):
        assert not any("forward" in vars(module) for module in norms(model))
