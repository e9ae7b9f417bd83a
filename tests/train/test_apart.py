"""Examples in one row: the losses and gradients are those of rows of their own, or the row is not used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from test_forward import examples, plain, small  # noqa: E402

from llmevo.train.apart import Apart, whole  # noqa: E402
from llmevo.train.data import Example, lay_out  # noqa: E402
from llmevo.train.forward import Forward  # noqa: E402
from llmevo.train.loop import checkpointing  # noqa: E402
from llmevo.train.together import one_behind_another  # noqa: E402


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("Llama", {}, True),
        ("Qwen2", {}, True),
        ("Granite", {"logits_scaling": 8.0}, True),
        ("GPT2", {"attn_pdrop": 0.0}, True),
        ("GPT2", {}, False),  # it drops attention in a training
        ("Gemma2", {"head_dim": 8}, False),  # it caps its scores
        ("Mistral", {"sliding_window": 4}, False),
        ("Mamba", {}, False),
    ],
)
def test_losses_and_gradients_are_those_of_rows(kind: str, options: dict[str, Any], expected: bool) -> None:
    torch.set_num_threads(1)
    model, sample = small(kind, **options), examples(9)
    pass_ = Forward(model, sample)
    assert pass_.apart is expected
    assert not model.training
    if not expected:
        return
    weight = next(p for name, p in model.named_parameters() if "embed_tokens" in name or "wte" in name)
    found = []
    for pass_.apart in (True, False):
        weight.requires_grad_(True)
        losses, owners = pass_.losses(sample)
        by_example = [losses[torch.from_numpy(owners == index)] for index in range(len(sample))]
        loss = sum((index + 1) * part.sum() for index, part in enumerate(by_example))
        found.append((torch.cat(by_example).detach(), torch.autograd.grad(loss, [weight])[0]))
        weight.requires_grad_(False)
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-5, rtol=0)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)


def test_an_example_beyond_the_window_and_recomputed_layers_go_back_to_rows() -> None:
    model = small("Mistral", sliding_window=25)
    sample = examples(9)
    pass_ = Forward(model, sample)
    assert pass_.apart
    assert max(map(len, sample)) > 25
    short = [example for example in sample if len(example) <= 25]
    assert not pass_.in_one_row(sample)
    assert pass_.in_one_row(short)
    for chosen in (sample, short):
        with torch.no_grad():
            losses, owners = pass_.losses(chosen)
        for index, example in enumerate(chosen):
            assert losses[torch.from_numpy(owners == index)].tolist() == pytest.approx(
                plain(model, example), abs=2e-4
            )
    checkpointing(model, True)
    assert not pass_.in_one_row(short)
    checkpointing(model, False)
    assert pass_.in_one_row(short)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([(2, 1), (4, 2), (3, 3)]))
def test_attention_is_the_textbooks(lengths: list[int], heads: tuple[int, int]) -> None:
    torch.manual_seed(sum(lengths))
    query, key, value = (
        torch.randn(sum(lengths), n, 8, dtype=torch.double) for n in (heads[0], *heads[1:] * 2)
    )
    scale = 0.3
    found = Apart(lengths).attend(0, query, key, value, scale)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    seen = (owner[:, None] == owner) & (place[:, None] >= place)
    for head in range(heads[0]):
        of_key = head * heads[1] // heads[0]
        scores = (query[:, head] @ key[:, of_key].T * scale).masked_fill(~seen, float("-inf"))
        torch.testing.assert_close(found[:, head], scores.softmax(-1) @ value[:, of_key])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4))
def test_one_behind_another_every_example_is_found_again(groups: list[list[int]]) -> None:
    rng = np.random.default_rng(len(groups))
    made = [[Example(rng.integers(1, 99, n), np.arange(n) > 0) for n in group] for group in groups]
    parts = [lay_out(group, True, sum(map(len, group))) for group in made]
    row = one_behind_another(parts)
    assert whole(row)
    flat = [example for group in made for example in group]
    for example, start, length in zip(flat, row.starts, row.lengths, strict=True):
        assert (row.tokens[0, start : start + length] == example.tokens).all()
        assert (row.positions[0, start : start + length] == np.arange(length)).all()
    for index, example in enumerate(flat):
        mine = row.owners == index
        assert (row.labels[mine] == example.tokens[1:]).all()
        assert (row.sources[mine] == row.starts[index] + np.arange(len(example) - 1)).all()
