"""Packing, without a model: every answer is read where exactly the right tokens are seen."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmevo.evaluate.packing import Batch, Limits, Packing, pack
from llmevo.evaluate.trie import Costs, Trie, divide

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)  # three tokens: most sequences share something
COSTS = st.builds(Costs, st.sampled_from([0.0, 0.001, 0.05, 1.0]), st.sampled_from([0.0, 4.0, 1000.0]))
LIMITS = st.builds(Limits, st.integers(1, 60), st.integers(1, 30))


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    """Contexts and continuations, some of which begin with a long prefix, or with one another."""
    prefix = draw(st.lists(st.integers(0, 2), max_size=40))
    contexts = draw(st.lists(TOKENS, min_size=1, max_size=6))
    found = []
    for context in contexts:
        whole = prefix + context if draw(st.booleans()) else context
        found += [(whole, c) for c in draw(st.lists(TOKENS, min_size=1, max_size=4))]
    return draw(st.permutations(found))


def seen_by_pair(packing: Packing) -> dict[int, tuple[list[tuple[int, int]], int]]:
    """For each pair, the (position, token)s that its logits rest on, and its target."""
    result: dict[int, tuple[list[tuple[int, int]], int]] = {}
    prefix: list[tuple[int, int]] = []
    for batch in packing.batches:
        places = list(zip(batch.positions.tolist(), batch.tokens.tolist(), strict=True))
        head = batch.start if batch.computes_prefix else 0
        if head:
            prefix = places[:head]
        visible = {i: places[: i + 1] for i in range(head)}
        base = prefix if batch.start else []
        outputs = visible_in_buckets(batch, places, base)
        for flat, output in enumerate(batch.scatter.tolist(), start=head):
            visible[flat] = outputs[output]
        for row, target, slot in zip(batch.rows, batch.targets, batch.slots, strict=True):
            assert int(slot) not in result
            result[int(slot)] = visible[int(batch.logits[row])], int(target)
    return result


def visible_in_buckets(
    batch: Batch, places: list[tuple[int, int]], base: list[tuple[int, int]]
) -> list[list[tuple[int, int]]]:
    outputs = []
    for bucket in batch.buckets:
        for number, row in enumerate(bucket.gather.tolist()):
            for i in range(len(row)):
                stop = bucket.seen[number] if bucket.seen.size else np.full(len(row), len(row))
                outputs.append(base + [places[row[j]] for j in range(i + 1) if i < stop[j]])
    return outputs


@settings(deadline=None, max_examples=300)
@given(requests(), COSTS, LIMITS, st.integers(12, 60))
def test_every_answer_rests_on_its_own_tokens(
    asked: list[tuple[list[int], list[int]]], costs: Costs, limits: Limits, longest: int
) -> None:
    packing = pack(asked, longest, costs, limits)
    pairs = seen_by_pair(packing)
    assert sorted(pairs) == list(range(packing.pairs))
    for (context, continuation), first in zip(asked, packing.first.tolist(), strict=True):
        whole = [*context, *continuation][-(longest + 1) :]
        for i, target in enumerate(continuation):
            seen, found = pairs[first + i]
            before = whole[: len(whole) - len(continuation) + i]
            assert found == target
            assert seen == list(enumerate(before))


@settings(deadline=None)
@given(requests(), COSTS, LIMITS)
def test_packing_follows_from_its_arguments_and_wastes_nothing(
    asked: list[tuple[list[int], list[int]]], costs: Costs, limits: Limits
) -> None:
    one, other = (pack(asked, 100, costs, limits) for _ in range(2))
    assert repr(one) == repr(other)
    assert one.tokens == sum(len(context) + len(continuation) - 1 for context, continuation in asked)
    distinct = {tuple([*c, *d][:-1]) for c, d in asked}
    prefixes = {sequence[: i + 1] for sequence in distinct for i in range(len(sequence))}
    assert len(prefixes) <= one.computed <= sum(map(len, distinct))
    # With attention for free, everything that is shared is computed once, in one row.
    free = pack(asked, 100, Costs(0.0, 0.0), limits)
    assert free.computed == len(prefixes)


def test_batches_are_balanced() -> None:
    rng = np.random.default_rng(0)
    asked = [(rng.integers(3, 999, 30).tolist(), rng.integers(3, 999, 8).tolist()) for _ in range(100)]
    packing = pack(asked, 100, Costs(0.001, 16.0), Limits(512, 512))
    sizes = [len(batch.tokens) for batch in packing.batches]
    assert len(sizes) == 8
    assert max(sizes) - min(sizes) <= 37


def test_a_prefix_of_all_items_is_computed_once() -> None:
    rng = np.random.default_rng(0)
    shots = rng.integers(3, 999, 300).tolist()
    asked = []
    for _ in range(40):
        context = shots + rng.integers(3, 999, 30).tolist()
        asked += [(context, rng.integers(3, 999, 8).tolist()) for _ in range(4)]
    packing = pack(asked, 2048, Costs(0.001, 16.0), Limits(512, 512))
    most = 300 + 40 * (30 + 4 * 7)
    assert most - 20 < packing.computed <= most  # now and then two random choices begin alike
    assert [batch.computes_prefix for batch in packing.batches] == [True] + [False] * 5
    assert packing.tokens == 160 * 337


def test_a_long_context_is_not_laid_beside_its_choices_for_nothing() -> None:
    context = list(range(3, 2003))
    packing = pack([(context, [i, 5, 6, 7]) for i in range(4)], 4096, Costs(0.001, 16.0), Limits(512, 512))
    assert packing.computed == 2000 + 4 * 3
    assert packing.batches[0].start == 2000


def test_sequences_that_each_begin_the_next_do_not_recurse() -> None:
    asked = [([1] * n, [1]) for n in range(1, 1200)]
    packing = pack(asked, 4096, Costs(0.0, 1e9), Limits(512, 4096))
    assert packing.computed == 1199


@given(st.lists(TOKENS.map(tuple), min_size=1, max_size=8))
def test_the_tree_is_numbered_in_preorder(sequences: list[tuple[int, ...]]) -> None:
    trie = Trie(sequences)
    for node in range(1, len(trie.end)):
        assert trie.parent[node] < node < trie.stop[node] <= trie.stop[trie.parent[node]]
        assert trie.begin[node] == trie.end[trie.parent[node]] < trie.end[node]
    for index, leaf in enumerate(trie.leaf):
        tokens: list[int] = []
        while leaf > 0:
            tokens[:0] = sequences[trie.source[leaf]][trie.begin[leaf] : trie.end[leaf]]
            leaf = trie.parent[leaf]
        assert tuple(tokens) == sequences[index]
    siblings = list(trie.children(0))
    firsts = [sequences[trie.source[node]][0] for node in siblings]
    assert all(one < other for one, other in itertools.pairwise(firsts))
    groups = divide(trie, Costs(0.001, 16.0))
    assert all(group.rows for group in groups)
