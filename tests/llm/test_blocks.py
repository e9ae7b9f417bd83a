"""Views of large spaces: blocks and handles, down and up again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_json import RandomJSON

from llmevo import Categorical, Condition, Float, Int, Optimizer, Space
from llmevo.llm.blocks import MANY_BLOCKS, ONE_BLOCK, Block, Handles, blocks, profiles, view
from llmevo.llm.decode import decode
from llmevo.llm.encode import encode, text
from llmevo.proposers import make
from llmevo.proposers.llm import LLM
from llmevo.trial import Trial


def merge_space(groups: int, models: int = 2, *, methods: bool = False) -> Space:
    """Genes as a merge has them: weights and densities of models by groups of layers."""
    genes: dict[str, Float | Int | Categorical] = {}
    if methods:
        genes["merge_method"] = Categorical("ties", "linear", "slerp")
        genes["only"] = Int(3, 3)
    for model in range(models):
        for kind in ("weight", "density"):
            for group in range(groups):
                genes[f"m{model}.{kind}.layers_{2 * group}_{2 * group + 1}"] = Float(0.0, 1.5)
    conditions = {
        name: Condition("merge_method", ("ties",)) for name in genes if methods and ".density" in name
    }
    return Space(genes, conditions)


SPACES = {
    "small": merge_space(3),
    "blocks": merge_space(8),
    "methods": merge_space(10, methods=True),
    "handles": merge_space(20),
    "many handles": merge_space(12, models=5, methods=True),
    "plain": Space({f"x{i}": Float(0, 1) for i in range(40)}),
    "nameless": Space({f"x{i}": Float(0, 1) for i in range(100)}),
    "words": Space({f"{a}{b}{c}": Float(0, 1) for a in "abcde" for b in "fghij" for c in "klm"}),
}
kinds = pytest.mark.parametrize("kind", SPACES)


@kinds
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), turn=st.integers(0, 40))
def test_the_incumbent_comes_back_exactly_and_every_answer_is_a_point(
    kind: str, seed: int, turn: int
) -> None:
    space, rng = SPACES[kind], np.random.default_rng(seed)
    best, other = space.sample(rng), space.sample(rng)
    shown = view(space, best, turn)
    assert shown.up(shown.down(best)) == best
    # Also through the integer levels that a model reads and writes: what it leaves alone stays as it is.
    answer = text(encode(shown.space, shown.down(best)))
    decoded = decode(shown.space, f'{{"proposals":[{{"genome":{answer}}}]}}', shown.down(best))
    if shown.kind == "handles":
        assert shown.up(decoded.points[0]) == best
    for point in (shown.space.sample(rng), shown.down(other)):
        assert shown.space.validate(point) == point
        assert space.validate(shown.up(point)) == shown.up(point)


@kinds
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), turn=st.integers(0, 40))
def test_a_block_changes_its_own_genes_alone(kind: str, seed: int, turn: int) -> None:
    space, rng = SPACES[kind], np.random.default_rng(seed)
    best = space.sample(rng)
    shown = view(space, best, turn)
    if not isinstance(shown, Block):
        return
    moved = shown.space.sample(rng)
    point = shown.up(moved)
    assert len(shown.space) <= ONE_BLOCK
    assert {name: point[name] for name in shown.space} == moved
    decided = {name for name, condition in space.conditions.items() if condition.gene in moved}
    assert {name for name in space if point[name] != best[name]} <= set(moved) | decided


@kinds
def test_every_gene_has_its_turn(kind: str) -> None:
    space = SPACES[kind]
    free = {name for name, gene in space.genes.items() if gene.count != 1}
    found = blocks(space)
    assert set().union(*found) == free
    assert all(0 < len(block) <= ONE_BLOCK and len(set(block)) == len(block) for block in found)


def test_what_is_shown_follows_from_the_size() -> None:
    kinds = {kind: view(space, None, 0).kind for kind, space in SPACES.items()}
    assert kinds == {
        "small": "all",
        "blocks": "block",
        "methods": "block",
        "handles": "handles",
        "many handles": "block",
        "plain": "block",
        "nameless": "handles",
        "words": "block",
    }
    assert all(
        len(view(space, None, turn).space) <= ONE_BLOCK for space in SPACES.values() for turn in range(9)
    )
    assert view(Space({f"x{i}": Float(0, 1) for i in range(ONE_BLOCK)}), None, 0).kind == "all"
    assert view(Space({f"x{i}": Float(0, 1) for i in range(MANY_BLOCKS)}), None, 0).kind == "block"


def test_blocks_are_layers_and_then_models() -> None:
    found = blocks(SPACES["blocks"])
    assert found[0] == [
        f"m{model}.{kind}.layers_{2 * group}_{2 * group + 1}"
        for group in range(4)
        for model in range(2)
        for kind in ("weight", "density")
    ]
    assert found[2] == [name for name in SPACES["blocks"] if name.startswith("m0")]


def test_profiles_are_found_in_every_form_of_name() -> None:
    names = [f"a.weight.point_{i}.self_attn" for i in range(12)] + [f"t.layers_{i}_{i}" for i in range(4)]
    space = Space({name: Float(0, 1) for name in [*reversed(names), "lambda", "b.layers_0_1"]})
    found = {stem: [space.names[place] for place in places] for stem, places in profiles(space).items()}
    assert found == {"a.weight.self_attn": names[:12], "t": names[12:]}, "by number, not by alphabet"


@settings(max_examples=50, deadline=None)
@given(
    level=st.floats(0.3, 0.7),
    slope=st.floats(-0.2, 0.2),
    curvature=st.floats(-0.2, 0.2),
    count=st.integers(4, 40),
)
def test_handles_say_what_they_mean(level: float, slope: float, curvature: float, count: int) -> None:
    space = Space({f"w.layers_{i}_{i}": Float(0, 1) for i in range(count)})
    handles = Handles(space, space.from_unit(np.full(count, 0.5)))
    values = space.to_unit(handles.up({"w.level": level, "w.slope": slope, "w.curvature": curvature}))
    moved = [round(100 * x) != round(100 * y) for x, y in ((level, 0.5), (slope / 2, 0), (curvature / 2, 0))]
    expected = [level if moved[0] else 0.5, slope if moved[1] else 0.0]
    assert values.mean() == pytest.approx(expected[0], abs=1e-6)
    assert values[-1] - values[0] == pytest.approx(expected[1], abs=0.011)
    assert handles.down(space.from_unit(values))["w.level"] == pytest.approx(values.mean(), abs=1e-6)


class _Raises:
    """Answers with every handle or gene at 90, and remembers how many it was asked for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def complete(self, request):  # type: ignore[no-untyped-def]
        from llmevo.llm import Reply

        genome = request.schema["properties"]["proposals"]["items"]["properties"]["genome"]["properties"]
        self.sizes.append(len(genome))
        answer = {key: part["enum"][0] if "enum" in part else 90 for key, part in genome.items()}
        return Reply(json.dumps({"proposals": [{"genome": answer, "why": ""}]}), mode="grammar")


@pytest.mark.parametrize("kind", ["blocks", "handles", "many handles"])
def test_the_proposer_shows_no_more_than_a_block(kind: str) -> None:
    space, client = SPACES[kind], _Raises()
    opt = Optimizer(space, LLM(space, "maximize", client=client), direction="maximize", seed=1)
    asked: list[Trial] = []
    for _ in range(5):
        for trial in opt.ask(1):
            asked.append(opt.tell(trial, float(space.to_unit(trial.params).mean())))
    assert client.sizes
    assert max(client.sizes) <= ONE_BLOCK
    shown = [trial.attrs["llm"]["shown"] for trial in asked[1:]]
    assert all(len(item["genes"]) <= ONE_BLOCK for item in shown)
    assert asked[-1].value > asked[0].value, "one block after another goes up"


@pytest.mark.parametrize("kind", ["methods", "handles", "many handles"])
@pytest.mark.parametrize("name", ["llm", "hybrid"])
def test_a_resumed_run_shows_the_same_blocks(kind: str, name: str) -> None:
    space = SPACES[kind]

    def optimizer(trials: tuple[Trial, ...] = ()) -> Optimizer:
        options = {"warmup": 3, "share": 0.6} if name == "hybrid" else {}
        proposer = make(name, space, "maximize", client=RandomJSON(faults=0.2), **options)
        return Optimizer(space, proposer, direction="maximize", seed=5, trials=trials)

    def go_on(opt: Optimizer, trials: int) -> Optimizer:
        while len(opt.trials) < trials:
            for trial in opt.ask(3):
                if trial.number % 7 == 3:
                    opt.tell(trial, error="no")
                else:
                    opt.tell(trial, -float(np.sum((space.to_unit(trial.params) - 0.6) ** 2)))
        return opt

    whole = go_on(optimizer(), 24)
    for cut in (6, 15):
        kept = tuple(Trial.from_json(json.loads(json.dumps(t.to_json()))) for t in whole.trials[:cut])
        assert go_on(optimizer(kept), 24).trials == whole.trials
    notes = [trial.attrs["llm"] for trial in whole.trials if "llm" in trial.attrs]
    assert any("shown" in note for note in notes)
