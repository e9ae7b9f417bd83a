"""Requests in batches of flat tokens without padding, each distinct beginning once.

Made once for a set of requests; a trial then runs forward passes and reads off answers. Everything here
follows from the requests and the settings, so that all candidates are computed alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt

from llmevo.evaluate.trie import Costs, Group, Trie, divide

Request: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""A context and a continuation, in tokens."""
_Ints: TypeAlias = npt.NDArray[np.int64]

_ALIKE = 0.5  # rows in one attention call: the shortest has this share of the longest's tokens at least
_SHORT = 32  # ... or the longest has no more tokens than this


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """How large a batch may be.

    Args:
        tokens: Tokens in a batch, unless a single row has more.
        logits: Positions in a batch at which logits are computed, unless a single row has more.
    """

    tokens: int
    logits: int


@final
@dataclass(frozen=True, slots=True)
class Bucket:
    """Rows of similar length, which attend in one call.

    Args:
        gather: Flat index of each token, `[rows, longest]`; padding repeats a row's last token.
        seen: One more than the last position in the row from which each token is seen, `[rows, longest]`:
            position i sees position j if `j <= i < seen[j]`. Empty if every token is seen by all later ones.
    """

    gather: _Ints
    seen: _Ints


@final
@dataclass(slots=True)
class Batch:
    """One forward pass over flat tokens: the prefix, if this batch computes it, then row after row.

    Args:
        tokens: Token ids, `[tokens]`.
        positions: Their positions in their sequences.
        start: Tokens of the prefix that all rows see; 0 for none.
        computes_prefix: Whether the prefix's tokens come first in this batch; otherwise its keys and values
            are those of the batch before.
        buckets: The rows' attention.
        scatter: Where each flat token after the prefix is in the buckets' outputs, laid end to end.
        logits: Flat indices of the positions at which logits are needed, ascending.
        rows: For each (position, target) pair that is asked here, an index into `logits`.
        targets: The pair's token.
        slots: The pair's place among all pairs of the plan.
    """

    tokens: _Ints
    positions: _Ints
    start: int
    computes_prefix: bool
    buckets: list[Bucket]
    scatter: _Ints
    logits: _Ints
    rows: _Ints
    targets: _Ints
    slots: _Ints

    @property
    def height(self) -> int:
        """Rows."""
        return sum(len(bucket.gather) for bucket in self.buckets)


@final
@dataclass(slots=True)
class Packing:
    """All batches of a set of requests; `pack` makes it.

    Args:
        requests: What is answered.
        room: The model's longest input.
        costs: What is worth sharing.
        limits: Size of a batch.
        batches: In the order in which they are to run.
        first: Index of each request's first (position, target) pair; its pairs follow one another.
        pairs: How many pairs there are.
        longest: Tokens of the longest sequence.
        tokens: Tokens of all sequences, each by itself.
        computed: Tokens of all batches.
    """

    requests: Sequence[Request]
    room: int
    costs: Costs
    limits: Limits
    batches: list[Batch]
    first: _Ints
    pairs: int
    longest: int
    tokens: int
    computed: int

    def fit(self, limits: Limits) -> None:
        """Lay the requests out in batches of another size; what they share stays the same."""
        if limits != self.limits:
            inputs = _inputs(self.requests, self.room)
            self.batches = _lay_out(self.requests, inputs, self.first, self.costs, limits)
            self.limits = limits


def pack(requests: Sequence[Request], longest: int, costs: Costs, limits: Limits) -> Packing:
    """Plan the batches that answer `requests`.

    Args:
        requests: Contexts and continuations, none of them empty. As in lm-eval, the last `longest + 1` tokens
            of the two count, and the very last is only predicted.
        longest: The model's longest input.
        costs: What is worth sharing.
        limits: Size of a batch.
    """
    inputs = _inputs(requests, longest)
    lengths = np.array([len(continuation) for _, continuation in requests], dtype=np.int64)
    first = np.cumsum(lengths) - lengths
    batches = _lay_out(requests, inputs, first, costs, limits)
    return Packing(
        requests,
        longest,
        costs,
        limits,
        batches,
        first,
        int(lengths.sum()),
        max(map(len, inputs)),
        sum(map(len, inputs)),
        sum(len(batch.tokens) for batch in batches),
    )


def _inputs(requests: Sequence[Request], longest: int) -> list[tuple[int, ...]]:
    """What goes through the model for each request, were it alone."""
    return [tuple([*context, *continuation][-(longest + 1) : -1]) for context, continuation in requests]


def _lay_out(
    requests: Sequence[Request],
    inputs: Sequence[tuple[int, ...]],
    first: _Ints,
    costs: Costs,
    limits: Limits,
) -> list[Batch]:
    trie = Trie(inputs)
    ending: dict[int, list[_Asked]] = {}
    for leaf, (_, continuation), slot in zip(trie.leaf, requests, first.tolist(), strict=True):
        asked = _Asked(trie.end[leaf] - len(continuation), continuation, slot)
        ending.setdefault(leaf, []).append(asked)
    return [batch for group in divide(trie, costs) for batch in _batches(trie, group, ending, limits)]


@final
@dataclass(frozen=True, slots=True)
class _Asked:
    """A continuation: the depth of the first position that predicts it, its tokens, its first pair's slot."""

    depth: int
    targets: Sequence[int]
    slot: int


@final
@dataclass(slots=True)
class _Row:
    """A row before it is in a batch.

    Args:
        tokens: Token ids.
        depths: Their positions in their sequences.
        seen: See `Bucket.seen`.
        asked: Of each pair, its index in the row (in the prefix, where the first row has 0, it is less than
            0), target and slot.
    """

    tokens: list[int]
    depths: list[int]
    seen: list[int]
    asked: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def logits(self) -> int:
        """Positions at which logits are needed."""
        return len({index for index, _, _ in self.asked})


def _row(trie: Trie, start: int, node: int, ending: dict[int, list[_Asked]]) -> _Row:
    """The subtree at `node` with the tokens between `start` and it; takes the sequences that it answers."""
    chain = trie.begin[node] - start
    whole = chain + trie.size[node]
    source = trie.sequences[trie.source[node]]
    row = _Row(list(source[start : trie.begin[node]]), list(range(start, trie.begin[node])), [whole] * chain)
    offset = {}
    for below in range(node, trie.stop[node]):
        begin, end = trie.begin[below], trie.end[below]
        offset[below] = len(row.tokens) - begin
        row.seen += [len(row.tokens) + trie.size[below]] * (end - begin)
        row.tokens += trie.sequences[trie.source[below]][begin:end]
        row.depths += range(begin, end)
    # Sequences that end above the node are answered by the first row that passes by.
    above, ends = trie.parent[node], list(range(node, trie.stop[node]))
    while above > 0:
        ends.append(above)
        above = trie.parent[above]
    for end in ends:
        for asked in ending.pop(end, ()):
            place = end
            for i in range(len(asked.targets) - 1, -1, -1):
                while trie.begin[place] > asked.depth + i:
                    place = trie.parent[place]
                index = asked.depth + i + offset.get(place, -start)
                row.asked.append((index, asked.targets[i], asked.slot + i))
    return row


def _batches(trie: Trie, group: Group, ending: dict[int, list[_Asked]], limits: Limits) -> Iterator[Batch]:
    """The group's batches, of about equal size, with the longest rows in the first."""
    rows = [_row(trie, group.start, node, ending) for node in group.rows]
    rows.sort(key=lambda row: -len(row.tokens))
    weights = [max(len(row.tokens) / limits.tokens, row.logits / limits.logits) for row in rows]
    before = group.start / limits.tokens  # the prefix is computed in the first batch
    total = before + sum(weights)
    count = math.ceil(total)
    parts: list[list[_Row]] = [[] for _ in range(count)]
    for row, weight in zip(rows, weights, strict=True):
        parts[min(int(before * count / total), count - 1)].append(row)
        before += weight
    prefix = trie.sequences[trie.source[group.node]][: group.start]
    # What is asked of the prefix is asked in the batch that computes it.
    inside = [pair for row in rows for pair in row.asked if pair[0] < 0]
    for number, part in enumerate(filter(None, parts)):
        yield _batch(part, prefix, inside if number == 0 else None)


def _batch(rows: list[_Row], prefix: Sequence[int], inside: list[tuple[int, int, int]] | None) -> Batch:
    """Lay rows end to end, after the prefix if `inside`, what is asked of it, is given."""
    computes = inside is not None and len(prefix) > 0
    head = len(prefix) if computes else 0
    tokens, depths = list(prefix[:head]), list(range(head))
    pairs = [(index + len(prefix), target, slot) for index, target, slot in inside or ()]
    offsets = []
    for row in rows:
        offsets.append(len(tokens))
        pairs += [(len(tokens) + index, target, slot) for index, target, slot in row.asked if index >= 0]
        tokens += row.tokens
        depths += row.depths
    buckets, scatter, base = [], np.zeros(len(tokens) - head, dtype=np.int64), 0
    for first, last in _alike([len(row.tokens) for row in rows]):
        bucket = _bucket(rows[first:last], offsets[first:last])
        buckets.append(bucket)
        width = bucket.gather.shape[1]
        for number, (row, offset) in enumerate(zip(rows[first:last], offsets[first:last], strict=True)):
            places = base + number * width + np.arange(len(row.tokens))
            scatter[offset - head : offset - head + len(row.tokens)] = places
        base += bucket.gather.size
    indices, targets, slots = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    logits, places = np.unique(indices, return_inverse=True)
    return Batch(
        np.array(tokens, dtype=np.int64),
        np.array(depths, dtype=np.int64),
        len(prefix),
        computes,
        buckets,
        scatter,
        logits,
        places,
        targets,
        slots,
    )


def _alike(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose lengths, which fall, are alike enough for one padded block."""
    first = 0
    for last in range(1, len(lengths) + 1):
        if last == len(lengths) or (lengths[first] > _SHORT and lengths[last] < _ALIKE * lengths[first]):
            yield first, last
            first = last


def _bucket(rows: list[_Row], offsets: list[int]) -> Bucket:
    width = len(rows[0].tokens)
    gather = np.zeros((len(rows), width), dtype=np.int64)
    seen = np.full((len(rows), width), width, dtype=np.int64)
    plain = True
    for number, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        length = len(row.tokens)
        gather[number] = offset + np.minimum(np.arange(width), length - 1)
        seen[number, :length] = row.seen
        plain = plain and min(row.seen) == length
    return Bucket(gather, seen[:, :0] if plain else seen)
