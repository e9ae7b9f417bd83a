"""What a set of token sequences shares, and how to compute shared tokens once.

A causal model's state at a token depends on the tokens up to it. Requests that begin alike (the choices of an
item, the items of a task with fixed few-shot examples) therefore share the states of what they share: in a
prefix tree of all requests, each node needs computing once. How much of that is worth doing is a question of
attention: tokens in one row attend to each other in a dense, masked product, wanted or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

_SHORTEST_PREFIX = 16  # tokens: a shorter beginning is cheaper to repeat than to keep


@final
@dataclass(frozen=True, slots=True)
class Costs:
    """What things cost, in units of one token's way through all linear layers.

    Args:
        pair: One query attending to one key in all layers.
        group: Beginning a forward pass of its own.
    """

    pair: float
    group: float


@final
class Trie:
    """A prefix tree whose edges are runs of tokens; nodes are numbered in preorder, 0 being the root.

    Args:
        sequences: Token sequences, none of them empty; repeats are allowed.

    Attributes:
        parent: Each node's parent.
        begin: Each node's first depth: how many tokens lie above its edge.
        end: The depth after its last token.
        stop: One more than the last node of its subtree.
        size: Tokens of its subtree, its own edge included.
        source: A sequence that runs through the node, as an index into `sequences`.
        leaf: The node at which each sequence ends.
    """

    def __init__(self, sequences: Sequence[tuple[int, ...]]) -> None:
        self.sequences = sequences
        order = sorted(range(len(sequences)), key=sequences.__getitem__)
        parent, end, source = [-1], [0], [order[0]]
        ends_at = [0] * len(sequences)
        path = [0]
        before: tuple[int, ...] = ()
        for index in order:
            tokens = sequences[index]
            shared = _common(before, tokens)
            below = -1
            while end[path[-1]] > shared:
                below = path.pop()
            if end[path[-1]] < shared:  # the edge to `below` parts here
                parent.append(path[-1])
                end.append(shared)
                source.append(source[below])
                parent[below] = len(end) - 1
                path.append(len(end) - 1)
            if end[path[-1]] < len(tokens):
                parent.append(path[-1])
                end.append(len(tokens))
                source.append(index)
                path.append(len(end) - 1)
            ends_at[index] = path[-1]
            before = tokens
        self._number(parent, end, source, ends_at)

    def _number(self, parent: list[int], end: list[int], source: list[int], ends_at: list[int]) -> None:
        """Fill the attributes, in preorder."""
        below: list[list[int]] = [[] for _ in parent]
        for node in range(len(parent) - 1, 0, -1):
            below[parent[node]].append(node)
        # Siblings stand in the order of their sequences, whatever the order in which edges parted.
        for nodes in below:
            nodes.sort(key=lambda node: self.sequences[source[node]], reverse=True)
        number = [0] * len(parent)
        order: list[int] = []
        stack = [0]
        while stack:
            node = stack.pop()
            number[node] = len(order)
            order.append(node)
            stack += below[node]
        self.parent = [number[parent[node]] if node else -1 for node in order]
        self.end = [end[node] for node in order]
        self.source = [source[node] for node in order]
        self.begin = [0] + [self.end[above] for above in self.parent[1:]]
        self.leaf = [number[node] for node in ends_at]
        self.size = [last - first for first, last in zip(self.begin, self.end, strict=True)]
        self.stop = list(range(1, len(order) + 1))
        for node in range(len(order) - 1, 0, -1):
            above = self.parent[node]
            self.size[above] += self.size[node]
            self.stop[above] = max(self.stop[above], self.stop[node])

    def children(self, node: int) -> Iterator[int]:
        """The nodes right below, in order."""
        child = node + 1
        while child < self.stop[node]:
            yield child
            child = self.stop[child]


@final
@dataclass(frozen=True, slots=True)
class Group:
    """Rows that attend to one common prefix.

    Args:
        start: Tokens of the prefix; 0 for none.
        node: The node at which the prefix ends.
        rows: Nodes whose subtrees are one row each, with the tokens between `start` and the node.
    """

    start: int
    node: int
    rows: tuple[int, ...]


def divide(trie: Trie, costs: Costs) -> list[Group]:
    """Cut the tree into rows and groups of rows, so that the sum of the costs is least.

    At every node there are three ways: one row of the whole subtree; the children by themselves, each with
    the tokens above it; or the tokens down to here as a prefix that is computed once and attended to by the
    children's rows.
    """
    ways: dict[tuple[int, int], str] = {}
    grouped: dict[int, float] = {}
    for node in range(len(trie.end) - 1, 0, -1):
        prefix = trie.end[node]
        branches = trie.stop[node] > node + 1 and trie.stop[node + 1] < trie.stop[node]
        if branches and prefix >= _SHORTEST_PREFIX:
            grouped[node] = (
                costs.group
                + prefix * (1 + costs.pair * prefix / 2)
                + _below(trie, node, prefix, costs, grouped, ways)
            )
    _below(trie, 0, 0, costs, grouped, ways)
    return _collect(trie, ways)


def _below(
    trie: Trie,
    top: int,
    start: int,
    costs: Costs,
    grouped: dict[int, float],
    ways: dict[tuple[int, int], str],
) -> float:
    """The least cost of all subtrees below `top` under a prefix of `start` tokens; writes the ways there."""
    least: dict[int, float] = {}
    for node in range(trie.stop[top] - 1, top, -1):
        row = trie.begin[node] - start + trie.size[node]
        best, way = row * (1 + costs.pair * (row + start)), "row"
        if trie.stop[node] > node + 1:
            split = sum(least[child] for child in trie.children(node))
            if split < best:
                best, way = split, "split"
        if grouped.get(node, best) < best:
            best, way = grouped[node], "group"
        least[node], ways[node, start] = best, way
    return sum(least[child] for child in trie.children(top))


def _collect(trie: Trie, ways: dict[tuple[int, int], str]) -> list[Group]:
    groups: list[Group] = []
    tops = [(0, 0)]
    while tops:
        top, start = tops.pop()
        rows: list[int] = []
        stack = list(trie.children(top))[::-1]
        while stack:
            node = stack.pop()
            way = ways[node, start]
            if way == "row":
                rows.append(node)
            elif way == "split":
                stack += list(trie.children(node))[::-1]
            else:
                tops.append((node, trie.end[node]))
        if rows:
            groups.append(Group(start, top, tuple(rows)))
    return groups


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Length of the common beginning, by bisection: comparing slices is faster than a loop."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
