"""The loop: the losses of transformers' Trainer, exact budgets, schedules, stopping and going on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from reference_trainer import of_trainer  # noqa: E402

from llmevo.errors import StageError  # noqa: E402
from llmevo.genome.train import TrainSettings  # noqa: E402
from llmevo.train import Trainer, adapters, methods  # noqa: E402
from llmevo.train.data import Example  # noqa: E402
from llmevo.train.forward import Forward  # noqa: E402
from llmevo.train.loop import Training, learning_rate, mean_of_late, plan, within  # noqa: E402


def run(
    model: Any, examples: list[Example], settings: TrainSettings, state: Path | None = None, **options: Any
) -> tuple[list[float], dict[str, Any]]:
    """The losses of a training, and the adapter's weights after it."""
    targets = adapters.Targets(model)
    steps = plan(examples, settings, 0)
    config = methods.config(settings, targets, 0, len(steps))
    with adapters.adapted(model, settings, config, "cand0000", 0) as adapter:
        training = Training(Forward(model, examples), adapter, examples, settings, 0, steps)
        training.run(model, state, **options)
        weights = {name: p.detach().clone() for name, p in adapter.parameters().items()}
    return training.losses, weights


@pytest.fixture(scope="module")
def facts(tiny: Any, tokenizer: Any, make_spec: Callable[..., Any]) -> list[Example]:
    return Trainer(make_spec(), tiny, tokenizer, seed=0)._data.parts["train"]


def as_texts(batch: list[Example]) -> dict[str, Any]:
    """A padded batch for a causal model, with its labels."""
    shape = (len(batch), max(map(len, batch)))
    ids, labels, mask = np.zeros(shape, int), np.full(shape, -100), np.zeros(shape, int)
    for row, one in enumerate(batch):
        ids[row, : len(one)], mask[row, : len(one)] = one.tokens, 1
        labels[row, : len(one)] = np.where(one.targets, one.tokens, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # accelerate's, on a CPU
def test_thirty_steps_are_those_of_peft_and_transformers_trainer(
    tiny_folder: Path, load_model: Callable[[Path], Any], facts: list[Example], tmp_path: Path
) -> None:
    # As many whole examples as thirty batches hold, so that none is cut.
    whole = plan(facts, TrainSettings(batch_size=8, epochs=8), 0)[:30]
    tokens = sum(end for step in whole for _, end in step)
    settings = TrainSettings(
        rank=4, learning_rate=3e-3, warmup=0, weight_decay=0.05, batch_size=8, tokens=tokens
    )
    ours, _ = run(load_model(tiny_folder), facts, settings)
    theirs, _ = of_trainer(load_model(tiny_folder), facts, settings, tmp_path, as_texts)
    assert len(ours) == len(theirs) == 30
    assert ours[-1] < ours[0] - 0.3  # it learns something
    assert np.abs(np.array(ours) - theirs).max() < 1e-5


@pytest.mark.parametrize("other", [{"accumulation": 3}, {"accumulation": 8, "checkpointing": True}])
@pytest.mark.usefixtures("untouched")
def test_how_a_batch_is_computed_does_not_change_the_training(
    tiny: Any, facts: list[Example], other: dict[str, Any]
) -> None:
    base = {"rank": 4, "learning_rate": 3e-3, "batch_size": 8, "epochs": 1.0}
    losses, weights = run(tiny, facts, TrainSettings(**base))
    again, others = run(tiny, facts, TrainSettings(**base, **other))
    assert losses == pytest.approx(again, abs=2e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=2e-4, rtol=0)


class Killed(Exception):
    """In place of a `kill -9`: nothing runs after it."""


@pytest.mark.parametrize(
    "adapter",
    [
        "lora",
        *(
            pytest.param(a, marks=pytest.mark.slow)
            for a in ("dora", "loraplus", "pissa", "vera", "deltalora", "qlora")
        ),
    ],
)
def test_a_training_goes_on_where_it_was_left(
    tiny: Any, facts: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    monkeypatch.setattr("llmevo.train.loop._SAVE_EVERY", 0.0)
    settings = TrainSettings(
        adapter=adapter, rank=4, dropout=0.2, learning_rate=3e-3, batch_size=8, epochs=1.5, schedule="wsd"
    )
    whole = run(tiny, facts, settings)
    state = tmp_path / "state.safetensors"

    def tick(step: int) -> None:
        if step == 6:
            raise Killed

    with pytest.raises(Killed):
        run(tiny, facts, settings, state, tick=tick)
    assert state.is_file()
    seen: list[int] = []
    again = run(tiny, facts, settings, state, tick=seen.append)
    assert seen == list(range(6, len(whole[0])))
    assert again[0] == whole[0]
    assert all(torch.equal(weight, again[1][name]) for name, weight in whole[1].items())
    assert not state.exists()


@pytest.mark.parametrize("stops", [(1, 4), (6, 7)])
@pytest.mark.parametrize(
    ("adapter", "schedule"),
    [("adalora", "constant"), ("lora", "wsd"), pytest.param("pissa", "wsd", marks=pytest.mark.slow)],
)
def test_a_training_that_stops_at_rungs_ends_as_one_without(
    tiny: Any, facts: list[Example], tmp_path: Path, adapter: str, schedule: str, stops: tuple[int, ...]
) -> None:
    settings = TrainSettings(
        adapter=adapter, rank=2, dropout=0.2, learning_rate=1e-2, batch_size=8, epochs=1.5, schedule=schedule
    )
    losses, weights = run(tiny, facts, settings)
    state = tmp_path / "state.safetensors"
    seen: list[int] = []
    for stop in stops:
        part, _ = run(tiny, facts, settings, state, tick=seen.append, until=stop)
        assert part == losses[:stop]
        assert state.is_file()
    again = run(tiny, facts, settings, state, tick=seen.append)
    assert seen == list(range(len(losses)))  # no step twice
    assert again[0] == losses
    assert all(torch.equal(weight, again[1][name]) for name, weight in weights.items())
    assert not state.exists()


def test_a_state_beyond_the_rung_is_not_used(tiny: Any, facts: list[Example], tmp_path: Path) -> None:
    settings = TrainSettings(rank=2, learning_rate=1e-2, batch_size=8)
    state = tmp_path / "state.safetensors"
    run(tiny, facts, settings, state, until=5)
    seen: list[int] = []
    run(tiny, facts, settings, state, tick=seen.append, until=2)
    assert seen == [0, 1]


@pytest.mark.parametrize("damage", [b"", b"\x00" * 64, None])
def test_a_state_of_another_training_or_damaged_is_not_used(
    tiny: Any, facts: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    monkeypatch.setattr("llmevo.train.loop._SAVE_EVERY", 0.0)
    settings = TrainSettings(rank=4, learning_rate=3e-3, batch_size=8)
    state = tmp_path / "state.safetensors"

    def tick(_: int) -> None:
        if state.exists():
            raise Killed

    with pytest.raises(Killed):
        run(tiny, facts, TrainSettings(rank=4, learning_rate=1e-3, batch_size=8), state, tick=tick)
    if damage is not None:
        state.write_bytes(damage)
    seen: list[int] = []
    losses, _ = run(tiny, facts, settings, state, tick=seen.append)
    assert seen[0] == 0
    assert losses == run(tiny, facts, settings)[0]


def test_a_loss_that_rises_ends_the_training() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(20.0)
    # What the model itself says is what it finds least surprising, so that any large step makes it worse.
    starts = torch.arange(1, 61)[:, None]
    texts = model.generate(starts, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    examples = [Example(row.numpy(), np.arange(len(row)) > 0) for row in texts]
    settings = TrainSettings(rank=4, learning_rate=1.0, warmup=0.1, batch_size=16, epochs=12)
    with pytest.raises(
        StageError, match=r"^train: the loss diverged from .* in step \d+ of 45: lower `train"
    ):
        run(model, examples, settings)
    assert len(run(model, examples, TrainSettings(rank=4, learning_rate=1e-5, batch_size=4))[0]) == 15


@given(
    st.lists(st.integers(2, 30), min_size=1, max_size=20),
    st.integers(1, 8),
    st.integers(2, 500),
    st.integers(0, 3),
)
def test_a_budget_in_tokens_is_kept_exactly(lengths: list[int], size: int, tokens: int, seed: int) -> None:
    examples = [Example(np.arange(n), np.arange(n) > 0) for n in lengths]
    settings = TrainSettings(batch_size=size, tokens=tokens)
    steps = plan(examples, settings, seed)
    seen = [pair for step in steps for pair in step]
    assert sum(end for _, end in seen) == tokens
    assert all(len(step) == size for step in steps[:-1])
    assert len(steps[-1]) <= size + 1  # a single last token has nothing to learn, and joins the step before
    assert all(end == lengths[index] for index, end in seen[:-1])
    epoch = len(lengths)
    for start in range(0, len(seen) - epoch + 1, epoch):
        assert sorted(index for index, _ in seen[start : start + epoch]) == list(range(epoch))
    assert plan(examples, settings, seed) == steps


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.floats(0.001, 0.999))
def test_a_rung_takes_as_many_steps_as_fit_its_share(sizes: list[int], share: float) -> None:
    steps = [[(0, size)] for size in sizes]
    count = within(steps, share)
    budget = round(share * sum(sizes))
    assert sum(sizes[:count]) <= budget
    assert count == len(sizes) or sum(sizes[: count + 1]) > budget
    assert within(steps, 1.0) == len(sizes)


def test_epochs_are_passes_over_all_examples(facts: list[Example]) -> None:
    seen = [pair for step in plan(facts, TrainSettings(batch_size=8, epochs=2), 0) for pair in step]
    assert len(seen) == 2 * len(facts)
    assert all(end == len(facts[index]) for index, end in seen)
    half = plan(facts, TrainSettings(batch_size=8, epochs=0.5), 0)
    assert sum(end for step in half for _, end in step) == round(0.5 * sum(map(len, facts)))


def test_a_budget_without_a_token_to_learn_is_a_failed_trial(facts: list[Example]) -> None:
    with pytest.raises(StageError, match=r"^train: the budget has no token to learn: raise `train.tokens`"):
        plan(facts, TrainSettings(tokens=2), 0)


def test_learning_rates() -> None:
    rates = [learning_rate(TrainSettings(warmup=0.2), step, 10) for step in range(10)]
    assert rates == pytest.approx([1.5e-4, *[3e-4] * 9])
    wsd = TrainSettings(schedule="wsd", warmup=0.2, decay=0.4, learning_rate=1.0)
    rates = [learning_rate(wsd, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert [learning_rate(TrainSettings(warmup=0), step, 2) for step in range(2)] == [3e-4, 3e-4]


def test_the_late_mean_weighs_the_last_most() -> None:
    assert mean_of_late([5.0]) == 5.0
    assert mean_of_late([5.0, 1.0]) == pytest.approx((0.9 * 5 + 1) / 1.9)
