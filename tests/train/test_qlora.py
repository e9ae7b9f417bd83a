"""QLoRA: the base as NF4 for the length of a trial, 8-bit AdamW, and the same in plain transformers."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

from llmevo.errors import GenomeError  # noqa: E402
from llmevo.genome.train import TrainSettings  # noqa: E402
from llmevo.train import Trainer, adapters, methods, nf4, optimizers  # noqa: E402
from llmevo.train.fuse import fuse  # noqa: E402

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.02}  # of what is written
PROBE = torch.tensor([[5, 6, 7, 8, 9, 10]])


def load_nf4(folder: Path, dtype: Any, auto: Any = None) -> Any:
    """The folder's model, as a user loads it in 4 bits; `auto` is its class, if it is no causal one."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    auto = auto or AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=dtype, quantization_config=quantization).eval()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):  # else a CPU may round to bfloat16
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.usefixtures("untouched")
def test_the_adapter_is_trained_and_scored_on_what_a_user_loads(
    tiny: Any, tiny_folder: Path, tokenizer: Any, make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    # The adapter is on the attention alone; all layers are quantised.
    from transformers import AutoConfig, AutoModelForCausalLM

    spec = make_spec(adapter="qlora", epochs=2, target_modules="attn")
    trainer = Trainer(spec, tiny, tokenizer, seed=0)
    plain = tiny(PROBE).logits
    with trainer.candidate(spec.settings({}), 0, "base", tmp_path / "trial") as trained:
        logits = tiny(PROBE).logits
        kinds = {type(m).__name__ for n, m in tiny.named_modules() if n.endswith(("base_layer", "up_proj"))}
        held = sum(trainer.losses("validation"))
    assert kinds == {"Linear4bit"}
    assert trained.metrics["loss_last"] < trained.metrics["loss_first"] - 0.3
    alone = peft.PeftModel.from_pretrained(load_nf4(tiny_folder, torch.float32), tmp_path / "trial").eval()
    torch.testing.assert_close(alone(PROBE).logits, logits, atol=2e-6, rtol=0)
    assert float((logits - plain).detach().abs().max()) > 0.1
    # What is kept is scored on the same base when it comes back.
    with trainer.candidate(spec.settings({}), 0, "base", tmp_path / "trial") as again:
        assert sum(trainer.losses("validation")) == pytest.approx(held, abs=1e-5)
    assert again == trained
    # So is what is exported: the weights that NF4 leaves, and the adapter.
    shutil.copytree(tiny_folder, tmp_path / "model")
    fuse(tmp_path / "model", tmp_path / "trial")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    stored = AutoConfig.from_pretrained(tiny_folder).dtype
    torch.testing.assert_close(exported(PROBE).logits, logits, atol=TOLERANCE[stored], rtol=0)


def test_the_optimizer_is_the_8_bit_one_of_bitsandbytes() -> None:
    settings = TrainSettings(adapter="qlora")
    start = torch.linspace(-1, 1, 8192).reshape(8, 1024)
    parameter, twin, copy = (torch.nn.Parameter(start.clone()) for _ in range(3))
    ours, exact = optimizers.make({"a": parameter}, settings), torch.optim.AdamW([twin], weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        parameter.grad = torch.randn(parameter.shape, generator=draw)
        twin.grad = parameter.grad.clone()
        optimizers.step(ours, 1e-3)
        exact.step()
    state = optimizers.state_of(ours, {"a": parameter})
    assert state["state1/a"].dtype == torch.uint8
    # Five steps of 1e-3, with moments of 8 bits.
    assert float((parameter - twin).detach().abs().mean()) < 2e-4
    # Another one goes on from the state, to the same bits.
    copy.data.copy_(parameter)
    other = optimizers.make({"a": copy}, settings)
    optimizers.resume(other, {"a": copy}, {key: tensor.clone() for key, tensor in state.items()})
    for optimizer, moved in ((ours, parameter), (other, copy)):
        moved.grad = torch.ones_like(moved)
        optimizers.step(optimizer, 1e-3)
    assert torch.equal(parameter, copy)


@pytest.mark.usefixtures("untouched")
def test_what_it_takes_is_counted(tiny: Any, tokenizer: Any, make_spec: Callable[..., Any]) -> None:
    facts = Trainer(make_spec(adapter="qlora"), tiny, tokenizer, seed=0).describe()["nf4"]
    settings, targets = TrainSettings(adapter="qlora", rank=4), adapters.Targets(tiny)
    with adapters.adapted(tiny, settings, methods.config(settings, targets, 0, 1), "cand0000", 0):
        held = 0
        for module in tiny.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                state = module.weight.quant_state
                held += module.weight.numel() + state.absmax.numel() + 4 * state.state2.absmax.numel()
    assert facts == {"bytes": held, "paged": False}


def test_a_gpt2_has_its_weights_the_usual_way_round(
    tokenizer: Any, make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).requires_grad_(False).eval()
    model.save_pretrained(tmp_path / "model")
    spec = make_spec(adapter="qlora", epochs=2)
    trainer = Trainer(spec, model, tokenizer, seed=0)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with trainer.candidate(spec.settings({}), 0, "base", tmp_path / "trial") as trained:
        logits = model(PROBE).logits
    assert trained.metrics["loss_last"] < trained.metrics["loss_first"]
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    on_nf4 = load_nf4(tmp_path / "model", torch.float32)
    alone = peft.PeftModel.from_pretrained(on_nf4, tmp_path / "trial").eval()
    torch.testing.assert_close(alone(PROBE).logits, logits, atol=2e-6, rtol=0)


def test_a_missing_package_is_said_before_the_run(
    tiny: Any, tokenizer: Any, make_spec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(adapter={"choice": ["lora", "qlora"]})
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    for check in (lambda: nf4.check(spec), lambda: Trainer(spec, tiny, tokenizer, seed=0)):
        with pytest.raises(GenomeError, match=r"needs the package bitsandbytes, .* \"llmevo\[qlora\]\""):
            check()
    nf4.check(make_spec())
