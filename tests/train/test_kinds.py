"""Every method on every kind of model: it learns and plain peft computes the same, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from test_heads import as_classes, as_pairs, files, make  # noqa: E402, F401
from test_heads import trained as trained  # noqa: E402
from test_qlora import load_nf4  # noqa: E402

from llmevo.errors import GenomeError  # noqa: E402
from llmevo.genome.train import ADAPTERS  # noqa: E402
from llmevo.train import Trainer  # noqa: E402

NOT_TRANSPOSED = ("shira", "loha", "lokr", "miss", "oft")  # peft has them for usual linear modules only
QUICK = ("lora", "ia3", "randlora", "oft")
PROBE = torch.tensor([[5, 6, 7, 8, 9, 10]])


def with_head(model: Any, pad: int) -> Any:
    """A user asks for the number of labels; the adapter brings the head."""
    model.score = torch.nn.Linear(32, 3, bias=False)
    model.num_labels = model.config.num_labels = 3
    model.config.pad_token_id = pad
    return model


@pytest.mark.parametrize("kind", ["t5", "llama", "gpt2"])
@pytest.mark.parametrize(
    "adapter",
    [a if a in QUICK else pytest.param(a, marks=pytest.mark.slow) for a in ADAPTERS if a != "qlora"],
)
@pytest.mark.filterwarnings("ignore:Specified to not save basis_A", "ignore:Sparse invariant checks")
def test_a_method_learns_and_loads_in_plain_peft_or_is_refused(
    kind: str, adapter: str, trained: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    rate = 5e-4 if adapter == "loraplus" else 3e-3  # LoRA+ trains B sixteen times as fast
    settings = {"adapter": adapter, "epochs": 4, "rank": 4, "learning_rate": rate}
    if kind == "gpt2" and adapter in NOT_TRANSPOSED:
        with pytest.raises(
            GenomeError, match=rf"`train` must not have {adapter} with this model, .* GPT-2's"
        ):
            trained(kind, **settings)
        return
    spec, model, trainer = trained(kind, **settings)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    examples = trainer._data.parts["validation"]
    collate = as_pairs if kind == "t5" else as_classes
    batch = {key: torch.as_tensor(value) for key, value in collate(examples).items()}
    before = sum(trainer.losses("train"))
    with trainer.candidate(spec.settings({}), 3, "b", tmp_path / "trial"), torch.no_grad():
        logits = model(**batch).logits
        assert sum(trainer.losses("train")) < 0.99 * before
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    alone = make(kind, len(tokenizer))
    if kind != "t5":
        alone = with_head(alone, model.config.pad_token_id)
    loaded = peft.PeftModel.from_pretrained(alone, tmp_path / "trial").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, logits, atol=3e-5, rtol=0)
    with trainer.candidate(spec.settings({}), 3, "b", tmp_path / "trial"), torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, logits, atol=3e-5, rtol=0)


def gpt2(vocabulary: int) -> Any:
    """A tiny random GPT-2 that goes on with a text; its modules hold their weights transposed."""
    from transformers import GPT2LMHeadModel

    whole = GPT2LMHeadModel(make("gpt2", vocabulary).config)
    whole.transformer.load_state_dict(make("gpt2", vocabulary).transformer.state_dict())
    return whole.requires_grad_(False).eval()


@pytest.mark.parametrize("kind", ["t5", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_qlora_trains_on_what_a_user_loads_in_4_bits(
    kind: str,
    make_spec: Any,
    tokenizer: Any,
    files: dict[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """T5 keeps `wo` in float, and bitsandbytes turns GPT-2's modules round: so must we."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    import transformers

    model = make("t5", len(tokenizer)) if kind == "t5" else gpt2(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    given = {"input_ids": PROBE, "decoder_input_ids": PROBE} if kind == "t5" else {"input_ids": PROBE}
    spec = make_spec(data=files["t5"], adapter="qlora", epochs=4, learning_rate=3e-3)
    trainer = Trainer(spec, model, tokenizer, seed=0)
    with trainer.candidate(spec.settings({}), 0, "base", tmp_path / "trial") as done, torch.no_grad():
        logits = model(**given).logits
        four = {
            n
            for n, m in model.named_modules()
            if isinstance(getattr(m, "weight", None), bitsandbytes.nn.Params4bit)
        }
    assert done.metrics["loss_last"] < done.metrics["loss_first"]
    four = {name.removesuffix(".base_layer") for name in four}
    assert not [name for name in four if name.endswith(".wo")]
    assert len(four) == (37 if kind == "t5" else 8)
    loaded = load_nf4(tmp_path / "model", torch.float32, auto)
    alone = peft.PeftModel.from_pretrained(loaded, tmp_path / "trial").eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(**given).logits, logits, atol=1e-5, rtol=0)
