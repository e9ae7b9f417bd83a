"""Candidates in a stack train as real peft trains each of them alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from peft.optimizers import create_loraplus_optimizer  # noqa: E402

from llmevo.genome.train import TrainSettings  # noqa: E402
from llmevo.train import Trainer, adapters, methods  # noqa: E402
from llmevo.train.data import Example, lay_out  # noqa: E402
from llmevo.train.forward import Forward  # noqa: E402
from llmevo.train.loop import Training, learning_rate, plan  # noqa: E402
from llmevo.train.stack import State, read, write  # noqa: E402
from llmevo.train.together import Candidate, Together, side_by_side  # noqa: E402

FOUR = [
    TrainSettings(rank=2, alpha=4, learning_rate=1e-3, batch_size=8, epochs=6, weight_decay=0.1),
    TrainSettings(
        rank=4, alpha=8, learning_rate=2e-3, batch_size=4, epochs=3, target_modules="attn", adapter="rslora"
    ),
    TrainSettings(
        rank=8,
        alpha=8,
        learning_rate=1e-2,
        batch_size=8,
        epochs=6,
        target_modules="mlp",
        schedule="wsd",
        clip=0.5,
    ),
    TrainSettings(
        rank=16,
        alpha=64,
        learning_rate=1e-3,
        batch_size=6,
        epochs=5,
        adapter="loraplus",
        loraplus_ratio=4,
        layers=1,
        accumulation=2,
    ),
]


@pytest.fixture(scope="module")
def facts(tiny: Any, tokenizer: Any, make_spec: Callable[..., Any]) -> list[Example]:
    return Trainer(make_spec(), tiny, tokenizer, seed=0)._data.parts["train"]


def begun(
    model: Any, examples: list[Example], chosen: TrainSettings, seed: int, state: Path | None = None
) -> Candidate:
    """A candidate before its first step, or where the state's file has it."""
    steps = plan(examples, chosen, seed)[:30]
    config = methods.config(chosen, adapters.Targets(model), seed, len(steps))
    with adapters.adapted(model, chosen, config, "cand0000", seed) as adapter:
        training = Training(Forward(model, examples), adapter, examples, chosen, seed, steps)
        if state is not None:
            assert training.load(state, 30)
        return Candidate(chosen, steps, read(model, "cand0000", training.optimizer, training.losses))


def alone(
    model: Any, examples: list[Example], chosen: TrainSettings, seed: int
) -> tuple[list[float], dict[str, Any]]:
    """The losses and weights of thirty steps of real peft, with its own optimizers, one example a row."""
    steps = plan(examples, chosen, seed)[:30]
    config = methods.config(chosen, adapters.Targets(model), seed, len(steps))
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, config)
    if chosen.adapter == "loraplus":
        optimizer = create_loraplus_optimizer(
            wrapped, torch.optim.AdamW, lr=chosen.learning_rate, loraplus_lr_ratio=chosen.loraplus_ratio
        )
    else:
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=chosen.learning_rate, weight_decay=chosen.weight_decay)
    highest = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for number, step in enumerate(steps):
        batch = lay_out([examples[index] for index, _ in step], packed=False)
        logits = wrapped(input_ids=torch.from_numpy(batch.tokens)).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits[batch.sources], torch.from_numpy(batch.labels))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), chosen.clip)
        factor = learning_rate(chosen, number, len(steps)) / chosen.learning_rate
        for group, most in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = most * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {key: p.detach().clone() for key, p in wrapped.named_parameters() if p.requires_grad}
    wrapped.unload()
    return losses, weights


def test_four_different_candidates_match_four_runs_of_peft(
    tiny_folder: Path, load_model: Callable[[Path], Any], tiny: Any, facts: list[Example], untouched: None
) -> None:
    stacked = together(tiny, facts, FOUR)
    stacked.run()
    for index, chosen in enumerate(FOUR):
        losses, weights = alone(load_model(tiny_folder), facts, chosen, index)
        assert len(losses) == 30
        assert np.abs(np.array(stacked.losses[index]) - losses).max() < 1e-5
        same_weights(stacked.state(index), weights)


def same_weights(state: State, weights: dict[str, Any]) -> None:
    """A state's weights are peft's, and have been trained."""
    assert len(state.factors) == len(weights)
    for (module, side), factor in state.factors.items():
        theirs = weights[f"base_model.model.{module}.lora_{side}.default.weight"]
        torch.testing.assert_close(factor.weight, theirs, atol=1e-3, rtol=0)
        assert factor.weight.abs().max() > 5e-3


def together(model: Any, examples: list[Example], chosen: list[TrainSettings]) -> Together:
    """These in a stack, each with its index as its seed."""
    candidates = [begun(model, examples, one, seed) for seed, one in enumerate(chosen)]
    return Together(model, Forward(model, examples), examples, candidates)


@pytest.mark.usefixtures("untouched")
def test_halving_leaves_the_survivors_as_they_were(tiny: Any, facts: list[Example]) -> None:
    whole, halved = together(tiny, facts, FOUR), together(tiny, facts, FOUR)
    whole.run([9] * 4)
    halved.run([5] * 4)
    assert [len(losses) for losses in halved.losses] == [5] * 4
    halved.keep([3, 1])
    halved.run([9] * 2)
    for index, before in enumerate([3, 1]):
        assert halved.losses[index] == pytest.approx(whole.losses[before], abs=1e-5)
        assert len(halved.losses[index]) == 9


@pytest.mark.usefixtures("untouched")
def test_a_survivor_goes_on_alone_and_back_in_a_stack(
    tiny: Any, facts: list[Example], tmp_path: Path
) -> None:
    pair = [FOUR[0], FOUR[2]]
    whole, first = together(tiny, facts, pair), together(tiny, facts, pair)
    whole.run([12, 12])
    first.run([3, 5])
    chosen, path = FOUR[2], tmp_path / "state.safetensors"
    steps = plan(facts, chosen, 1)[:30]
    config = methods.config(chosen, adapters.Targets(tiny), 1, 30)
    with adapters.adapted(tiny, chosen, config, "cand0001", 1) as adapter:
        training = Training(Forward(tiny, facts), adapter, facts, chosen, 1, steps)
        write(first.state(1), tiny, "cand0001", training.optimizer)
        training.losses = list(first.losses[1])
        training.save(path)
        training.run(tiny)
    assert training.losses[:12] == pytest.approx(whole.losses[1], abs=1e-5)
    stacked = Together(
        tiny,
        Forward(tiny, facts),
        facts,
        [begun(tiny, facts, FOUR[1], 2), begun(tiny, facts, chosen, 1, path)],
    )
    stacked.run([4, 12])
    assert stacked.losses[1] == pytest.approx(whole.losses[1], abs=1e-5)


@pytest.mark.usefixtures("untouched")
def test_one_that_is_not_finite_stops_and_the_others_do_not_notice(tiny: Any, facts: list[Example]) -> None:
    alone, broken = together(tiny, facts, FOUR[:1]), together(tiny, facts, FOUR)
    for factor in broken.state(2).factors.values():
        factor.weight[0, 0] = math.nan
    alone.run([6])
    broken.run([6] * 4)
    assert "not finite in step 1 of 30" in str(broken.errors[2])
    assert [error is None for error in broken.errors] == [True, True, False, True]
    assert broken.losses[0] == pytest.approx(alone.losses[0], abs=1e-5)
    for index in (0, 1, 3):
        assert len(broken.losses[index]) == 6
        assert all(factor.weight.isfinite().all() for factor in broken.state(index).factors.values())


@settings(max_examples=50, deadline=None)
@given(st.data(), st.booleans())
def test_side_by_side_every_target_is_found_again(data: st.DataObject, packed: bool) -> None:
    lengths = st.lists(st.integers(1, 9), min_size=1, max_size=4)
    groups = data.draw(st.lists(lengths, min_size=1, max_size=4))
    rng = np.random.default_rng(len(groups))
    parts = []
    for group in groups:
        made = [Example(rng.integers(1, 99, n), np.arange(n) > 0) for n in group]
        parts.append(lay_out(made, packed, data.draw(st.integers(1, 12))))
    width = max(part.tokens.shape[1] for part in parts) + data.draw(st.integers(0, 3))
    whole = side_by_side(parts, width)
    assert whole.tokens.shape[1] == width
    at = 0
    for part in parts:
        own = part.tokens.shape[1]
        rows = slice(at, at + len(part.tokens))
        assert (whole.tokens[rows, :own] == part.tokens).all()
        assert (whole.positions[rows, :own] == part.positions).all()
        assert not whole.tokens[rows, own:].any()
        at += len(part.tokens)
    assert at == len(whole.tokens)
    flat = [part.tokens.flat[part.sources] for part in parts]
    assert (whole.tokens.flat[whole.sources] == np.concatenate(flat)).all()
    assert (whole.labels == np.concatenate([part.labels for part in parts])).all()
    assert len(np.unique(whole.owners)) == sum(n > 1 for group in groups for n in group)
