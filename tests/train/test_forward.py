"""The forward pass gives each target the loss that the plain model gives it, however it is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from llmevo.train import quick  # noqa: E402
from llmevo.train.data import Example  # noqa: E402
from llmevo.train.forward import Forward  # noqa: E402


def examples(count: int, vocabulary: int = 64, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        length = int(rng.integers(3, 30))
        targets = rng.random(length) < 0.6
        targets[0], targets[-1] = False, True
        found.append(Example(rng.integers(1, vocabulary, length), targets))
    return found


def plain(model: Any, example: Example) -> list[float]:
    """transformers' own logits of one example, all positions."""
    tokens = torch.from_numpy(example.tokens)[None]
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0].double()
    losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")
    return losses[torch.from_numpy(example.targets[1:])].tolist()


def small(kind: str, **options: Any) -> Any:
    import transformers

    shape = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    if kind not in ("Mamba", "GPT2"):
        shape |= heads
    if kind == "GPT2":
        shape = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = getattr(transformers, f"{kind}Config")(**shape, **options)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(config).eval()
        for parameter in model.parameters():  # random models are too alike in all they say
            parameter.data.mul_(6.0) if parameter.dim() > 1 else None
    return model


@pytest.mark.parametrize(
    ("kind", "options", "packed", "partial"),
    [
        ("Llama", {}, True, True),
        ("GPT2", {}, True, True),
        ("Mistral", {"sliding_window": 4}, True, True),
        ("Granite", {"logits_scaling": 8.0}, True, False),
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}, True, False),
        ("Mamba", {}, False, True),
    ],
)
def test_losses_are_those_of_the_plain_model(
    kind: str, options: dict[str, Any], packed: bool, partial: bool
) -> None:
    torch.set_num_threads(1)
    model, sample = small(kind, **options), examples(9)
    pass_ = Forward(model, sample)
    assert (pass_.packed, pass_.partial) == (packed, partial)
    with torch.no_grad():
        losses, owners = pass_.losses(sample)
    for index, example in enumerate(sample):
        assert losses[torch.from_numpy(owners == index)].tolist() == pytest.approx(
            plain(model, example), abs=2e-4
        )


def test_a_cap_on_logits_is_seen_while_they_are_small() -> None:
    """A training makes them large, and then the head alone would give other losses."""
    torch.set_num_threads(1)
    model, sample = small("Gemma2", final_logit_softcapping=30.0, head_dim=8), examples(9)
    weight = model.get_output_embeddings().weight
    weight.data.mul_(0.2)
    pass_ = Forward(model, sample)
    weight.data.mul_(40.0)
    with torch.no_grad():
        losses, owners = pass_.losses(sample)
    assert losses[torch.from_numpy(owners == 0)].tolist() == pytest.approx(plain(model, sample[0]), abs=2e-4)


def test_the_head_in_chunks_gives_the_same_losses_and_gradients(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = examples(12)
    pass_ = Forward(tiny, sample)
    weight = tiny.model.layers[0].mlp.up_proj.weight

    def found() -> tuple[Any, Any]:
        weight.requires_grad_(True)
        losses, _ = pass_.losses(sample)
        (gradient,) = torch.autograd.grad(losses.sum(), [weight])
        weight.requires_grad_(False)
        return losses.detach(), gradient

    whole = found()
    monkeypatch.setattr(quick, "_ROWS", 7)
    chunked = found()
    torch.testing.assert_close(chunked[0], whole[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(chunked[1], whole[1], atol=1e-6, rtol=1e-5)


def test_the_validation_loss_is_the_mean_of_each_example(
    tiny: Any, tokenizer: Any, make_spec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmevo.train import Trainer, measure

    held = Trainer(
        make_spec(data={"train": make_spec().data.train, "validation": 0.5}), tiny, tokenizer, seed=0
    )
    parts = held._data.parts["validation"]
    expected = [float(np.mean(plain(tiny, example))) for example in parts]
    assert held.losses("validation") == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(measure, "_TOKENS_AT_ONCE", 60)
    assert held.losses("validation") == pytest.approx(expected, abs=1e-5)
