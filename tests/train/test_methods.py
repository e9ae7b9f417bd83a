"""Methods and first weights that peft lacks or that move the base: what they compute, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from llmevo.errors import GenomeError  # noqa: E402
from llmevo.genome.train import ADAPTERS, TrainSettings  # noqa: E402
from llmevo.train import Trainer, adapters, methods  # noqa: E402
from llmevo.train.snippet import snippet  # noqa: E402

PROBE = torch.tensor([[5, 6, 7, 8, 9, 10]])


def test_delta_lora_moves_the_base_as_its_paper_says(tiny: Any, untouched: None) -> None:
    settings = TrainSettings(adapter="deltalora", rank=4, alpha=8, delta_lambda=0.5, delta_start=0.25)
    targets = adapters.Targets(tiny)
    scale = 0.5 * 8 / 4
    draw = torch.Generator().manual_seed(0)
    with adapters.adapted(tiny, settings, methods.config(settings, targets, 0, 8), "cand0000", 0) as adapter:
        layer = tiny.model.layers[1].mlp.down_proj
        a, b = layer.lora_A["cand0000"].weight, layer.lora_B["cand0000"].weight
        expected = layer.get_base_layer().weight.clone()
        for step in range(8):
            before = b.detach() @ a.detach()
            with torch.no_grad():  # in place of an optimizer
                for parameter in adapter.parameters().values():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
            adapter.stepped(step, 8)
            if step > 2:  # K = 2 of Algorithm 1: W <- W + lambda * alpha / r * (B'A' - BA)
                expected += scale * (b.detach() @ a.detach() - before)
            torch.testing.assert_close(layer.get_base_layer().weight, expected, atol=2e-6, rtol=0)
            assert adapter.memory() or step < 2
    assert float((layer.get_base_layer().weight - expected).abs().max()) > 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"init": "gaussian"},
        {"init": "orthogonal"},
        {"init": "olora"},
        {"init": "pissa", "adapter": "rslora"},
        {"init": "olora", "adapter": "dora"},
        {"adapter": "deltalora", "init": "orthogonal", "delta_start": 0.5},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.usefixtures("untouched")
def test_first_weights_are_trained_and_saved(
    settings: dict[str, Any],
    tiny: Any,
    tiny_folder: Path,
    load_model: Callable[[Path], Any],
    tokenizer: Any,
    make_spec: Callable[..., Any],
    tmp_path: Path,
) -> None:
    spec = make_spec(alpha=6, learning_rate=3e-3, **settings)
    trainer = Trainer(spec, tiny, tokenizer, seed=0)
    untrained = tiny(PROBE).logits
    chosen, targets = spec.settings({}), adapters.Targets(tiny)
    with adapters.adapted(tiny, chosen, methods.config(chosen, targets, 0, 1), "cand0000", 0):
        torch.testing.assert_close(tiny(PROBE).logits, untrained, atol=2e-5, rtol=0)
    with trainer.candidate(chosen, 0, "base", tmp_path / "trial") as trained:
        logits = tiny(PROBE).logits
    assert trained.metrics["loss_last"] < trained.metrics["loss_first"]
    alone = peft.PeftModel.from_pretrained(load_model(tiny_folder), tmp_path / "trial").eval()
    torch.testing.assert_close(alone(PROBE).logits, logits, atol=5e-6, rtol=0)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.filterwarnings("ignore:Specified to not save basis_A and basis_B")
def test_the_settings_to_copy_are_those_of_the_training(adapter: str, tiny: Any) -> None:
    settings = TrainSettings(adapter=adapter, rank=4, dropout=0.1, layers=2, init="gaussian")
    wanted = methods.config(settings, adapters.Targets(tiny), 7, 40).to_dict()
    python, _, _ = snippet(settings, wanted, 40, None).partition("from trl")
    names: dict[str, Any] = {}
    exec(python, names)
    given = names["peft_config"].to_dict()
    unsaid = {"fan_in_fan_out", "save_projection"}
    assert {key: value for key, value in wanted.items() if given[key] != value and key not in unsaid} == {}


def test_a_gpt2_cannot_start_from_olora(tokenizer: Any, make_spec: Callable[..., Any]) -> None:
    """What methods it cannot have is in test_kinds.py."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    spec = make_spec(init={"choice": ["default", "olora"]})
    with pytest.raises(
        GenomeError, match=r"`train` must not have init: olora with this model, .* as GPT-2's"
    ):
        Trainer(spec, GPT2LMHeadModel(config).eval(), tokenizer, seed=0)
