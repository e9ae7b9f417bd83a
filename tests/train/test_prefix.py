"""The layers below the adapters are computed once for each example, with the same losses and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from test_forward import examples, small  # noqa: E402

from llmevo.genome.train import TrainSettings  # noqa: E402
from llmevo.train import Trainer, adapters, methods  # noqa: E402
from llmevo.train.data import Example, lay_out  # noqa: E402
from llmevo.train.forward import Forward  # noqa: E402
from llmevo.train.prefix import Prefix  # noqa: E402

CHOSEN = TrainSettings(rank=4, layers=2, learning_rate=1e-2, batch_size=8, init="gaussian")


@contextmanager
def passes(layer: Any) -> Iterator[list[int]]:
    """How many tokens go through a layer within the block, pass by pass."""
    found: list[int] = []
    hook = layer.mlp.register_forward_hook(lambda _, given, __: found.append(given[0][..., 0].numel()))
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def on(model: Any, chosen: TrainSettings, above: Forward | None = None) -> Iterator[adapters.Adapter]:
    """An adapter on the model that is no longer as it began, so that it changes the losses."""
    config = methods.config(chosen, adapters.Targets(model), 0, 10)
    with adapters.adapted(model, chosen, config, "cand0000", 0) as adapter:
        for number, parameter in enumerate(adapter.parameters().values()):
            drawn = np.random.default_rng(number).normal(size=parameter.shape)
            parameter.data += 0.05 * torch.from_numpy(drawn).to(parameter)
        if above is None:
            yield adapter
            return
        with above.above():
            yield adapter


@pytest.fixture(scope="module")
def known() -> list[Example]:
    return examples(24, vocabulary=250)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_losses_and_gradients_are_those_of_all_layers(tiny: Any, known: list[Example], data: Any) -> None:
    """Over packings: any examples, known and not, cut or whole, in rows of any width, and side by side."""
    torch.set_num_threads(1)
    pass_ = Forward(tiny, known, known[:16])
    assert pass_.prefix is not None
    pass_.packed = pass_.prefix._packed = data.draw(st.booleans())
    indices = data.draw(st.lists(st.integers(0, len(known) - 1), min_size=1, max_size=12))
    chosen = [known[index].first(data.draw(st.integers(3, len(known[index])))) for index in indices]
    batch = lay_out(chosen, pass_.packed, data.draw(st.integers(1, 90)))
    if not len(batch.labels):
        return
    layers = data.draw(st.integers(1, 3))
    found = []
    for above in (None, pass_):
        with on(tiny, replace(CHOSEN, layers=layers), above) as adapter:
            assert pass_.prefix.first == (0 if above is None else 4 - layers)
            tiny.train()
            losses = pass_.nll(batch)
            parameters = list(adapter.parameters().values())
            found.append((losses.detach(), torch.autograd.grad(losses.mean(), parameters)))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=0)
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("untouched")
def test_each_example_goes_through_the_layers_below_once(tiny: Any, known: list[Example]) -> None:
    pass_ = Forward(tiny, known, known)
    assert pass_.prefix is not None
    for rank in (2, 4):
        with (
            passes(tiny.model.layers[1]) as below,
            passes(tiny.model.layers[2]) as above,
            on(tiny, replace(CHOSEN, rank=rank), pass_),
        ):
            tried = len(above)
            for part in (known[:6], known[6:], known[3:9], known[:6]):
                pass_.losses(part)
        assert len(above) == tried + 4
        if rank == 2:
            assert pass_.prefix.tokens <= sum(below) < 2 * pass_.prefix.tokens  # the trial's included
        else:
            assert below == []


@pytest.mark.usefixtures("untouched")
def test_other_weights_below_have_states_of_their_own(
    tiny: Any, known: list[Example], load_model: Callable[[Path], Any], tiny_llamas: Any
) -> None:
    model, other = load_model(tiny_llamas.base), load_model(tiny_llamas.parents[0])
    pass_ = Forward(model, known, known)
    expected = []
    for one in (model, other):
        with on(one, CHOSEN), torch.no_grad():
            expected.append(Forward(one, known).losses(known)[0])
    assert (expected[0] - expected[1]).abs().max() > 0.01
    original = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for wanted, source in zip((0, 1, 0), (original, dict(other.named_parameters()), original), strict=True):
        with torch.no_grad():  # as a merge does it: in place
            for name, parameter in model.named_parameters():
                parameter.copy_(source[name])
        with on(model, CHOSEN, pass_), torch.no_grad():
            torch.testing.assert_close(pass_.losses(known)[0], expected[wanted], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "options", "spared"),
    [
        ("Llama", {}, True),
        (
            "GPT2",
            {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0},
            True,
        ),
        ("Mistral", {"sliding_window": 4}, True),
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8, "sliding_window": 4}, True),
        ("Mamba", {}, True),
    ],
)
def test_other_decoders_are_entered_too(kind: str, options: dict[str, Any], spared: bool) -> None:
    torch.set_num_threads(1)
    sample = examples(9)
    model = small(kind, **options)
    pass_ = Forward(model, sample, sample)
    names = ("in_proj",) if kind == "Mamba" else "all-linear"  # peft refuses Mamba's others
    chosen = replace(CHOSEN, layers=1, target_modules=names)
    found = []
    for above in (None, pass_):
        with on(model, chosen, above), torch.no_grad():
            assert pass_.prefix is not None
            assert pass_.prefix.first == (0 if above is None else 1)
            model.train()
            found.append(pass_.losses(sample)[0])
            model.eval()
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=0)


def test_with_dropout_below_only_evaluations_are_spared() -> None:
    sample = examples(9)
    model = small("GPT2")
    pass_ = Forward(model, sample, sample)
    assert pass_.prefix is not None
    assert not pass_.prefix.still
    with on(model, replace(CHOSEN, layers=1), pass_), torch.no_grad():
        plain = [pass_.losses(sample)[0] for _ in range(2)]
        model.train()
        torch.manual_seed(0)
        drawn = [pass_.losses(sample)[0] for _ in range(2)]
        model.eval()
    assert torch.equal(*plain)
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("chosen", [replace(CHOSEN, layers=None), None])
@pytest.mark.usefixtures("untouched")
def test_nothing_is_spared_where_all_layers_have_adapters_or_none(
    tiny: Any, known: list[Example], chosen: TrainSettings | None
) -> None:
    pass_ = Forward(tiny, known, known)
    assert pass_.prefix is not None
    if chosen is None:
        with pass_.above():
            assert pass_.prefix.first == 0
        return
    with on(tiny, chosen, pass_):
        assert pass_.prefix.first == 0


def test_a_model_that_cannot_be_entered_is_computed_whole(
    tiny_folder: Path, load_model: Callable[[Path], Any], known: list[Example]
) -> None:
    model, sample = load_model(tiny_folder), known[:6]
    seen: list[Any] = []
    model.model.layers[0].register_forward_hook(lambda _, __, made: seen.append(made))
    plain = model.model.layers[3].forward
    model.model.layers[3].forward = lambda hidden, *_, **others: plain(hidden + seen[-1], **others)
    pass_ = Forward(model, known, known)
    found = []
    for above in (None, pass_):
        with on(model, replace(CHOSEN, layers=1), above), torch.no_grad():
            assert pass_.prefix is not None
            assert pass_.prefix.first == 0
            found.append(pass_.losses(sample)[0])
    assert torch.equal(*found)


def test_what_does_not_fit_is_computed_each_time(tiny: Any, known: list[Example]) -> None:
    pass_ = Forward(tiny, known, known)
    assert pass_.prefix is not None
    tokens = sum(map(len, known[:5]))
    few = Prefix(tiny.model, pass_.prefix._run, pass_.packed, known, most=64 * 4 * (tokens + 1))
    assert (few.tokens, few.bytes) == (tokens, 64 * 4 * tokens)
    pass_.prefix = few
    found = []
    with torch.no_grad():
        for above in (None, pass_):
            with on(tiny, CHOSEN, above):
                found.append(pass_.losses(known)[0])
        for layers in (1, 3, 2):  # each of which leaves no room for the others
            with on(tiny, replace(CHOSEN, layers=layers), pass_):
                pass_.losses(known)
                held = [state.nbytes for one in few._held.values() for state in one.states.values()]
                assert sum(held) == few.bytes
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("adapter", ["lora", "dora", "pissa", "vera", "ia3", "deltalora", "qlora"])
@pytest.mark.usefixtures("untouched")
def test_a_training_is_the_same(
    tiny: Any, tokenizer: Any, make_spec: Callable[..., Any], tmp_path: Path, adapter: str
) -> None:
    if adapter == "qlora":
        pytest.importorskip("bitsandbytes")
    # 400 tokens end inside an example; the learning rate is one at which rounding does not grow.
    spec = make_spec(adapter=adapter, layers=2, tokens=400, batch_size=5, learning_rate=1e-3)
    trainer = Trainer(spec, tiny, tokenizer, seed=3)
    forward = trainer._forward
    assert isinstance(forward, Forward)
    assert trainer.describe()["prefix"]["tokens"] > 400
    found = []
    for prefix in (None, forward.prefix):
        forward.prefix = prefix
        with trainer.candidate(spec.settings({}), 0, "base", tmp_path / str(prefix is None)) as trained:
            found.append((trained.metrics, trainer.losses("validation")))
        # Kept, it is put on again, as for the held-out items.
        with (
            passes(tiny.model.layers[1]) as below,
            trainer.candidate(spec.settings({}), 0, "base", tmp_path / str(prefix is None)),
        ):
            assert trainer.losses("validation") == pytest.approx(found[-1][1], abs=1e-5)
            assert (len(below) == 0) == (prefix is not None)
    (plain, losses), (spared, others) = found
    assert spared == pytest.approx(plain, abs=2e-5)
    assert others == pytest.approx(losses, abs=2e-5)


@pytest.mark.usefixtures("untouched")
def test_a_stack_enters_above_its_lowest_adapter(
    tiny: Any, tokenizer: Any, make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    spec = make_spec(layers=2, tokens=400, batch_size=5, learning_rate=1e-3, together="off")
    chosen = [replace(spec.settings({}), rank=rank, layers=layers) for rank, layers in ((2, 2), (4, 1))]
    trainer = Trainer(spec, tiny, tokenizer, seed=3)
    asked = [(one, n, tmp_path / f"trial{n}", None) for n, one in enumerate(chosen)]
    with passes(tiny.model.layers[2]) as above:
        assert trainer.ahead(asked, "base") == 2
    assert len(above) > 2
    other = [(replace(one, learning_rate=2e-3), n, tmp_path / f"b{n}", None) for n, one in enumerate(chosen)]
    with passes(tiny.model.layers[1]) as below:
        assert trainer.ahead(other, "base") == 2
    assert below == [] or max(below) < 60  # the example that the budget cuts
