"""Adapters on the resident model: computed, saved as plain peft reads them, gone without a trace."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from llmevo.errors import StageError  # noqa: E402
from llmevo.genome.train import ADAPTERS, TrainSettings, TrainSpec  # noqa: E402
from llmevo.train import Trainer, adapters, methods  # noqa: E402

PROBE = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "qlora"])  # see test_qlora.py
@pytest.mark.usefixtures("untouched")
@pytest.mark.filterwarnings(  # of plain peft, about RandLoRA and SHiRA
    "ignore:Specified to not save basis_A and basis_B", "ignore:Sparse invariant checks are implicitly"
)
def test_an_adapter_learns_and_plain_peft_computes_the_same(
    adapter: str,
    tiny: Any,
    tiny_folder: Path,
    load_model: Callable[[Path], Any],
    tokenizer: Any,
    make_spec: Callable[..., Any],
    tmp_path: Path,
) -> None:
    spec = make_spec(adapter=adapter, dropout=0.1, epochs=2)
    trainer = Trainer(spec, tiny, tokenizer, seed=0)
    before = sum(trainer.losses("validation"))
    with trainer.candidate(spec.settings({}), 7, "base", tmp_path / "trial") as trained:
        logits = tiny(PROBE).logits
        after = sum(trainer.losses("validation"))
    assert after < 0.99 * before
    assert trained.metrics["loss_last"] < trained.metrics["loss_first"]
    alone = peft.PeftModel.from_pretrained(load_model(tiny_folder), tmp_path / "trial").eval()
    torch.testing.assert_close(alone(PROBE).logits, logits, atol=2e-6, rtol=0)
    # The loaded one is the trained one, and what is kept is not trained again.
    with trainer.candidate(spec.settings({}), 7, "base", tmp_path / "trial") as again:
        torch.testing.assert_close(tiny(PROBE).logits, logits, atol=2e-6, rtol=0)
    assert again == trained


def test_lorafa_freezes_a_and_loraplus_speeds_up_b(
    tiny: Any, tokenizer: Any, make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    def moved(adapter: str) -> tuple[float, float]:
        """How far the first step moved A and B; AdamW's first step is the learning rate."""
        from safetensors.torch import load_file

        spec = make_spec(adapter=adapter, batch_size=64, warmup=0, clip=0, learning_rate=1e-3)
        trainer = Trainer(spec, tiny, tokenizer, seed=0)
        with trainer.candidate(spec.settings({}), 0, "b", tmp_path / adapter) as trained:
            assert trained.metrics["steps"] == 1
        settings = TrainSettings(rank=4)
        targets = adapters.Targets(tiny)
        with adapters.adapted(tiny, settings, methods.config(settings, targets, 0, 1), "cand0000", 0) as a:
            start = {k: v.clone() for k, v in a._state().items()}
        end = load_file(tmp_path / adapter / "adapter_model.safetensors")
        steps = [max(float((end[k] - start[k]).abs().max()) for k in end if side in k) for side in "AB"]
        return steps[0], steps[1]

    # B is zero at first, so that A has no gradient in the first step.
    assert moved("lora") == (0.0, pytest.approx(1e-3, rel=1e-3))
    assert moved("lorafa") == (0.0, pytest.approx(1e-3, rel=1e-3))
    assert moved("loraplus") == (0.0, pytest.approx(1.6e-2, rel=1e-3))
    spec = make_spec(adapter="lorafa")
    trainer = Trainer(spec, tiny, tokenizer, seed=0)
    with trainer.candidate(spec.settings({}), 0, "b") as trained:
        half = trained.metrics["parameters"]
        assert not any(p.requires_grad for n, p in tiny.named_parameters() if "lora_A" in n)
    with trainer.candidate(make_spec().settings({}), 0, "b") as trained:
        assert half < 0.6 * trained.metrics["parameters"]


@pytest.mark.parametrize("adapter", ["lora", "pissa", "vera"])
@pytest.mark.usefixtures("untouched")
def test_whatever_fails_the_model_is_as_before(
    adapter: str, tiny: Any, tokenizer: Any, make_spec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(adapter=adapter)
    trainer = Trainer(spec, tiny, tokenizer, seed=0)

    def evaluate() -> None:
        with trainer.candidate(spec.settings({}), 1, "base"):
            raise RuntimeError("in the evaluation")

    with pytest.raises(RuntimeError, match="in the evaluation"):
        evaluate()
    # A training that breaks off in a backward pass.
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > 3:
            raise MemoryError("while training")

    handle = tiny.model.norm.register_forward_hook(hook)
    try:
        with pytest.raises(MemoryError), trainer.candidate(spec.settings({}), 2, "base"):
            pass
    finally:
        handle.remove()
    # An adapter that breaks off half-way through the modules.
    kind = {"vera": peft.tuners.vera.VeraModel}.get(adapter, peft.tuners.lora.LoraModel)
    real, done = kind._create_and_replace, 0

    def replace(*args: Any, **kwargs: Any) -> None:
        nonlocal done
        done += 1
        if done > 5:
            raise RuntimeError("half-way")
        real(*args, **kwargs)

    monkeypatch.setattr(kind, "_create_and_replace", replace)
    with pytest.raises(RuntimeError, match="half-way"), trainer.candidate(spec.settings({}), 3, "base"):
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("untouched")
def test_memory_stays_flat_over_200_trials(
    tiny: Any, tokenizer: Any, make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    kinds = ["lora", "dora", "pissa", "vera", "ia3"]
    trainer = Trainer(make_spec(tokens=300), tiny, tokenizer, seed=0)

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return len(tensors), sum(t.numel() * t.element_size() for t in tensors)

    seen = []
    for number in range(200):
        settings = make_spec(tokens=300, adapter=kinds[number % 5], rank=1 + number % 8).settings({})
        with trainer.candidate(settings, number, "base"):
            trainer.losses("test")
        if number in (19, 199):
            seen.append((*held(), len(list(tiny.modules()))))
    assert seen[0] == seen[1]


def names(model: Any, **settings: Any) -> set[str]:
    return set(adapters.Targets(model).modules(TrainSettings(**settings)))


def test_targets_of_a_llama(tiny: Any) -> None:
    attention, mlp = names(tiny, target_modules="attn"), names(tiny, target_modules="mlp")
    assert len(attention) == 4 * 4
    assert len(mlp) == 4 * 3
    assert names(tiny) == attention | mlp
    assert names(tiny, layers=1, target_modules=("q_proj", "mlp.up_proj")) == {
        "model.layers.3.self_attn.q_proj",
        "model.layers.3.mlp.up_proj",
    }
    assert adapters.Targets(tiny).suffixes(TrainSettings(target_modules="attn")) == [
        "k_proj",
        "o_proj",
        "q_proj",
        "v_proj",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "pissa", "vera", "ia3", "adalora"])
def test_a_gpt2_is_trained_and_saved(
    adapter: str, tokenizer: Any, make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128)
    model = GPT2LMHeadModel(config).requires_grad_(False).eval()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer = Trainer(make_spec(), model, tokenizer, seed=0)
    rate = 0.1 if adapter == "ia3" else 0.01  # fewer weights, which less would leave in dropout's noise
    spec = make_spec(adapter=adapter, epochs=4, learning_rate=rate)
    with trainer.candidate(spec.settings({}), 0, "base", tmp_path / "t") as trained:
        logits = model(PROBE).logits
    assert trained.metrics["loss_last"] < trained.metrics["loss_first"] - 0.05
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    alone = peft.PeftModel.from_pretrained(model, tmp_path / "t").eval()
    torch.testing.assert_close(alone(PROBE).logits, logits, atol=2e-6, rtol=0)


def test_targets_of_a_gpt2_that_names_two_modules_alike() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)).eval()
    targets = adapters.Targets(model)
    assert targets.suffixes(TrainSettings(target_modules="attn")) == ["attn.c_proj", "c_attn"]
    settings = TrainSettings(target_modules="attn", rank=2, layers=1)
    with adapters.adapted(model, settings, methods.config(settings, targets, 0, 1), "cand0000", 0):
        wrapped = {n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert wrapped == {"transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"}
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules())


def test_a_rank_that_fits_the_chosen_modules_is_allowed(
    tiny: Any, tokenizer: Any, make_spec: Callable[..., Any]
) -> None:
    for allowed in ({"target_modules": "mlp"}, {"adapter": "vera"}):
        trainer = Trainer(make_spec(rank=64, **allowed), tiny, tokenizer, seed=0)
        assert trainer.settings({}).rank == 64


def test_a_damaged_record_is_trained_again(
    tiny: Any, tokenizer: Any, make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    spec: TrainSpec = make_spec(tokens=300)
    trainer = Trainer(spec, tiny, tokenizer, seed=0)
    folder = tmp_path / "trial"
    with trainer.candidate(spec.settings({}), 0, "base", folder) as first:
        pass
    weights = (folder / "adapter_model.safetensors").read_bytes()
    for damage in ("", "[]", json.dumps({"key": "another"})):
        (folder / "training.json").write_text(damage)
        (folder / "adapter_model.safetensors").write_bytes(b"")
        with trainer.candidate(spec.settings({}), 0, "base", folder) as again:
            pass
        assert again == first
        assert (folder / "adapter_model.safetensors").read_bytes() == weights


def test_a_loss_that_is_not_finite_ends_the_training_and_leaves_no_adapter(
    tiny_folder: Path,
    load_model: Callable[[Path], Any],
    tokenizer: Any,
    make_spec: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = load_model(tiny_folder)
    trainer = Trainer(make_spec(), model, tokenizer, seed=0)
    model.model.norm.weight[3] = float("nan")
    with (
        pytest.raises(
            StageError, match=r"^train: the loss is not finite in step 1 of 8: lower `train.learning"
        ),
        trainer.candidate(make_spec().settings({}), 0, "base", tmp_path / "trial"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StageError, match=r"^evaluate: the loss of the test examples is not finite"):
        trainer.losses("test")
