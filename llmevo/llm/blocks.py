"""What a language model sees of a space with many genes: a block of them, or handles on profiles over depth.

A model can handle about sixteen numbers. Of up to 64 genes it gets one block after another, while the others
stay as in the best point; the blocks are taken by layer, by model and by filter in turn. Of more genes it
gets, for each profile over the layers (one for each model, parameter and filter), a level, a slope and a
curvature. They move the best point's profile and keep its details, which belong to the coordinates' own
optimizer.

A view is a space of its own, with a way down from points of the whole and back up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, final

import numpy as np

from llmevo.llm.encode import LEVELS
from llmevo.space import Categorical, Float, Gene, Params, Space, Value, Vector

ONE_BLOCK = 16  # genes; up to here a model sees them all
MANY_BLOCKS = 64  # genes; above, it sees handles
_PROFILE = 4  # layers that make a profile worth three handles
_DEPTH = re.compile(r"(?:^|\.)(?:layers_(\d+)_\d+|point_(\d+))(?=\.|$)|(?<=[A-Za-z_])(\d+)$")
_PARTS = ("level", "slope", "curvature")
_SLOPE = 0.5  # of the profile's coefficient for one unit of the handle: ends differ by the handle


class View(Protocol):
    """A small space that stands for a large one."""

    @property
    def space(self) -> Space:
        """What the model sees."""
        ...

    @property
    def kind(self) -> Literal["all", "block", "handles"]:
        """What was left out."""
        ...

    @property
    def meanings(self) -> Mapping[str, str]:
        """What the view's own genes do."""
        ...

    def down(self, params: Mapping[str, Value]) -> Params:
        """The view of a point."""
        ...

    def up(self, seen: Mapping[str, Value]) -> Params:
        """The point that a point of the view stands for."""
        ...


@final
@dataclass(frozen=True)
class Whole:
    """Everything.

    Args:
        space: The space.
    """

    space: Space
    kind: Literal["all", "block", "handles"] = "all"
    meanings: Mapping[str, str] = field(default_factory=dict)

    def down(self, params: Mapping[str, Value]) -> Params:
        """The point itself."""
        return dict(params)

    def up(self, seen: Mapping[str, Value]) -> Params:
        """The point itself."""
        return dict(seen)


@final
class Block:
    """Some genes; the others stay as in `incumbent`.

    A gene that is switched off in the incumbent by one outside the block is left out.

    Args:
        space: The whole space.
        names: The genes of the block.
        incumbent: Where the others stay.
    """

    kind: Literal["all", "block", "handles"] = "block"

    def __init__(self, space: Space, names: Sequence[str], incumbent: Params) -> None:
        self.whole = space
        self.incumbent = incumbent
        seen = _visible(space, names, incumbent)
        conditions = {
            name: condition
            for name, condition in space.conditions.items()
            if {name, condition.gene} <= set(seen)
        }
        self.space = Space({name: space.genes[name] for name in seen}, conditions)
        self.meanings: Mapping[str, str] = {}

    def down(self, params: Mapping[str, Value]) -> Params:
        """The block's values; the incumbent's where a gene is switched off from outside the block."""
        seen: Params = {}
        for name, gene in self.space.genes.items():
            if self.whole.is_active(name, params):
                seen[name] = params[name]
            else:
                active = self.whole.is_active(name, self.incumbent)
                seen[name] = self.incumbent[name] if active else gene.start
        return self.space.validate(seen)

    def up(self, seen: Mapping[str, Value]) -> Params:
        """The incumbent with the block's values; what they switch on starts at its `init`."""
        params: Params = {}
        for name, gene in self.whole.genes.items():
            if not self.whole.is_active(name, params):
                params[name] = None
            elif name in self.space.genes:
                params[name] = seen[name]
            else:
                active = self.whole.is_active(name, self.incumbent)
                params[name] = self.incumbent[name] if active else gene.start
        return self.whole.validate(params)


@final
class Handles:
    """Level, slope and curvature of each profile over depth, in the unit cube; other genes as they are.

    With z from -1 (first layer) to 1 (last), a profile is moved by
    `level + slope/2 * z + curvature * (z^2 - mean(z^2))`: the level is the mean of the profile, the slope the
    difference of its ends, the curvature how much its ends lie above its middle. `up(down(incumbent))` is the
    incumbent.

    Args:
        space: The whole space.
        incumbent: Whose profiles are moved.
    """

    kind: Literal["all", "block", "handles"] = "handles"

    def __init__(self, space: Space, incumbent: Params) -> None:
        self.whole = space
        self._unit = space.to_unit(incumbent)
        self._profiles = profiles(space)
        self._basis = {stem: _basis(len(places)) for stem, places in self._profiles.items()}
        self._fit = {stem: np.linalg.pinv(basis) for stem, basis in self._basis.items()}
        inside = {place for places in self._profiles.values() for place in places}
        self._alone = [name for index, name in enumerate(space) if index not in inside]
        genes: dict[str, Gene] = {name: space.genes[name] for name in self._alone}
        self.meanings: dict[str, str] = {}
        for stem, places in self._profiles.items():
            many = f"of the {len(places)} values of {stem} from the first layer to the last"
            for part, low, start, text in (
                ("level", 0.0, 0.5, f"mean {many}"),
                ("slope", -1.0, 0.0, f"difference of the ends {many}; 50 is flat"),
                ("curvature", -1.0, 0.0, f"how far the ends lie above the middle {many}; 50 is straight"),
            ):
                genes[f"{stem}.{part}"] = Float(low, 1.0, init=start)
                self.meanings[f"{stem}.{part}"] = text
        conditions = {name: c for name, c in space.conditions.items() if name in self._alone}
        self.space = Space(genes, conditions)
        self._mine = self.down(incumbent)

    def down(self, params: Mapping[str, Value]) -> Params:
        """The handles that fit the point's profiles best, and its other genes."""
        unit = self.whole.to_unit(params)
        seen: Params = {name: params[name] for name in self._alone}
        for stem, places in self._profiles.items():
            fitted = (self._fit[stem] @ unit[places]).tolist()
            for part, value, low in zip(_PARTS, fitted, (0.0, -1.0, -1.0), strict=True):
                seen[f"{stem}.{part}"] = min(max(value, low), 1.0)
        return self.space.validate(seen)

    def up(self, seen: Mapping[str, Value]) -> Params:
        """The incumbent with its profiles moved; a handle at the incumbent's level moves nothing."""
        unit = self._unit.copy()
        for stem, places in self._profiles.items():
            steps = np.array([self._step(f"{stem}.{part}", seen) for part in _PARTS])
            if steps.any():
                unit[places] = np.clip(unit[places] + self._basis[stem] @ steps, 0.0, 1.0)
        params: Params = {}
        for coordinate, (name, gene) in zip(unit.tolist(), self.whole.genes.items(), strict=True):
            if not self.whole.is_active(name, params):
                params[name] = None
            else:
                params[name] = seen[name] if name in self._alone else gene.from_unit(coordinate)
        return self.whole.validate(params)

    def _step(self, name: str, seen: Mapping[str, Value]) -> float:
        gene = self.space.genes[name]
        new, old = seen[name], self._mine[name]
        assert isinstance(gene, Float)
        assert isinstance(new, float)
        assert isinstance(old, float)
        same = round(LEVELS * gene.to_unit(new)) == round(LEVELS * gene.to_unit(old))
        return 0.0 if same else new - old


@final
class Nested:
    """A block of the handles, where there are too many of them.

    Args:
        handles: The handles.
        block: Of the handles' space.
    """

    kind: Literal["all", "block", "handles"] = "block"

    def __init__(self, handles: Handles, block: Block) -> None:
        self.handles = handles
        self.block = block
        self.space = block.space
        self.meanings: Mapping[str, str] = handles.meanings

    def down(self, params: Mapping[str, Value]) -> Params:
        """The block's handles of a point."""
        return self.block.down(self.handles.down(params))

    def up(self, seen: Mapping[str, Value]) -> Params:
        """The incumbent with the block's profiles moved."""
        return self.handles.up(self.block.up(seen))


def view(space: Space, incumbent: Params | None, turn: int) -> View:
    """What the model sees at its call number `turn`.

    Args:
        space: The whole space.
        incumbent: The best point; None for the space's start.
        turn: Which of the blocks' turns it is, from 0.
    """
    best = space.start() if incumbent is None else incumbent
    free = [name for name, gene in space.genes.items() if gene.count != 1]
    if len(free) <= ONE_BLOCK:
        return Whole(space)
    if len(free) <= MANY_BLOCKS or not profiles(space):
        return _block(space, best, turn)
    handles = Handles(space, best)
    if len(handles.space) <= ONE_BLOCK:
        return handles
    return Nested(handles, _block(handles.space, handles.down(best), turn))


def _block(space: Space, best: Params, turn: int) -> Block:
    shown = [names for names in blocks(space) if _visible(space, names, best)]
    return Block(space, shown[turn % len(shown)], best)


def _visible(space: Space, names: Sequence[str], incumbent: Params) -> list[str]:
    """Those of `names` that the incumbent, or another of them, switches on."""
    seen: list[str] = []
    for name in space:
        condition = space.conditions.get(name)
        inside = condition is not None and condition.gene in seen
        if name in names and (inside or space.is_active(name, incumbent)):
            seen.append(name)
    return seen


def blocks(space: Space) -> list[list[str]]:
    """Blocks of at most sixteen genes: by layer, then by model, then by filter, as far as the names tell.

    Every gene with more than one value is in at least one of them.
    """
    free = [name for name, gene in space.genes.items() if gene.count != 1]
    found: list[list[str]] = []
    for key in (_layer, _first, _last):
        groups: dict[str, list[str]] = {}
        for name in free:
            groups.setdefault(key(name), []).append(name)
        if 1 < len(groups) < len(free):
            found += [block for block in _packed(list(groups.values())) if block not in found]
    return found or list(_packed([free]))


def _packed(groups: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Groups put together while they fit into a block, and cut where they do not."""
    block: list[str] = []
    for group in groups:
        if block and len(block) + len(group) > ONE_BLOCK:
            yield block
            block = []
        block = [*block, *group]
        while len(block) > ONE_BLOCK:
            yield block[:ONE_BLOCK]
            block = block[ONE_BLOCK:]
    if block:
        yield block


def _layer(name: str) -> str:
    match = _DEPTH.search(name)
    return match.group(0) if match else ""


def _first(name: str) -> str:
    return name.rpartition(".")[0].split(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2] if "." in name else ""


def profiles(space: Space) -> dict[str, list[int]]:
    """Indices of numeric genes that differ in depth alone, by their common name, from first to last layer."""
    found: dict[str, list[tuple[int, int]]] = {}
    for index, (name, gene) in enumerate(space.genes.items()):
        match = _DEPTH.search(name)
        if match is None or isinstance(gene, Categorical):
            continue
        depth = next(int(group) for group in match.groups() if group is not None)
        stem = (name[: match.start()] + name[match.end() :]).strip("._") or "profile"
        found.setdefault(stem, []).append((depth, index))
    taken = set(space)
    return {
        stem: [index for _, index in sorted(members)]
        for stem, members in found.items()
        if len(members) >= _PROFILE and stem not in taken
    }


def _basis(count: int) -> Vector:
    """What a unit of each handle adds, shape (count, 3)."""
    z = np.linspace(-1.0, 1.0, count)
    return np.stack([np.ones(count), _SLOPE * z, z**2 - np.mean(z**2)], axis=1)
