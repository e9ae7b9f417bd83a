"""The space's invariants: exact round trips, stable validation, values that JSON can hold, clear errors."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmevo import Categorical, Condition, Float, Int, Space, SpaceError
from llmevo.space import Gene

finite = st.floats(-1e9, 1e9, allow_subnormal=False)
units = st.floats(0, 1)


@st.composite
def floats(draw: st.DrawFn) -> Float:
    if draw(st.booleans()):
        low, high = sorted([draw(st.floats(1e-12, 1e9)), draw(st.floats(1e-12, 1e9))])
        return Float(low, high, log=True)
    if draw(st.booleans()):
        step = draw(st.sampled_from([0.05, 0.1, 1 / 3, 0.25, 2.0, 7.5]))
        low = draw(st.sampled_from([0.0, -1.0, 0.3, 100.0]))
        return Float(low, low + step * draw(st.integers(0, 500)), step=step)
    low, high = sorted([draw(finite), draw(finite)])
    return Float(low, high)


@st.composite
def ints(draw: st.DrawFn) -> Int:
    if draw(st.booleans()):
        low = draw(st.integers(1, 10**6))
        return Int(low, low + draw(st.integers(0, 10**12)), log=True)
    step, low = draw(st.integers(1, 9)), draw(st.integers(-(10**6), 10**6))
    return Int(low, low + step * draw(st.integers(0, 10**11)), step=step)


choices = st.one_of(st.text(max_size=4), st.integers(), finite, st.booleans(), st.none())
categoricals = st.builds(
    lambda values, ordered: Categorical(*values, ordered=ordered),
    st.lists(choices, min_size=1, max_size=6, unique_by=lambda value: (type(value), value)),
    st.booleans(),
)
genes: st.SearchStrategy[Gene] = st.one_of(floats(), ints(), categoricals)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """One to six genes, some of them conditional on an earlier Categorical."""
    found = {f"g{i}": gene for i, gene in enumerate(draw(st.lists(genes, min_size=1, max_size=6)))}
    conditions: dict[str, Condition] = {}
    deciding: list[str] = []
    for name, gene in found.items():
        if deciding and draw(st.booleans()):
            parent = draw(st.sampled_from(deciding))
            values = draw(st.lists(st.sampled_from(found[parent].choices), min_size=1, max_size=2))  # type: ignore[union-attr]
            conditions[name] = Condition(parent, tuple(values))
        if isinstance(gene, Categorical):
            deciding.append(name)
    return Space(found, conditions)


@st.composite
def points(draw: st.DrawFn) -> tuple[Space, list[float]]:
    space = draw(spaces())
    return space, draw(st.lists(units, min_size=len(space), max_size=len(space)))


@given(points())
def test_round_trips_are_exact(drawn: tuple[Space, list[float]]) -> None:
    space, unit = drawn
    params = space.from_unit(unit)
    again = space.to_unit(params)
    assert ((again >= 0) & (again <= 1)).all()
    assert space.from_unit(again) == params
    assert (space.to_unit(space.from_unit(again)) == again).all()


@given(points())
def test_validating_changes_nothing_twice(drawn: tuple[Space, list[float]]) -> None:
    space, unit = drawn
    params = space.from_unit(unit)
    assert space.validate(params) == params
    assert list(space.validate(dict(reversed(params.items())))) == space.names


@given(points())
def test_json_keeps_values_and_types(drawn: tuple[Space, list[float]]) -> None:
    space, unit = drawn
    params = space.from_unit(unit)
    again = json.loads(json.dumps(params, allow_nan=False))
    assert again == params
    assert [type(value) for value in again.values()] == [type(value) for value in params.values()]
    assert space.key(again) == space.key(params)


@given(points(), st.data())
def test_keys_are_equal_exactly_for_equal_points(
    drawn: tuple[Space, list[float]], data: st.DataObject
) -> None:
    space, unit = drawn
    other = data.draw(st.lists(units, min_size=len(space), max_size=len(space)))
    first, second = space.from_unit(unit), space.from_unit(other)
    same = [(type(a), a) == (type(b), b) for a, b in zip(first.values(), second.values(), strict=True)]
    assert (space.key(first) == space.key(second)) == all(same)


@given(spaces())
def test_the_start_is_a_point_and_so_is_every_sample(space: Space) -> None:
    assert space.validate(space.start()) == space.start()
    assert space.from_unit(space.start_unit()) == space.start()
    sample = space.sample(np.random.default_rng(0))
    assert space.validate(sample) == sample
    for name, gene in space.genes.items():
        assert (
            sample[name] is None
            or not isinstance(gene, (Float, Int))
            or gene.low <= sample[name] <= gene.high
        )  # type: ignore[operator]


@given(floats(), st.data())
def test_a_value_that_a_user_gives_is_kept_to_twelve_digits(gene: Float, data: st.DataObject) -> None:
    value = data.draw(st.floats(gene.low, gene.high))
    kept = gene.validate(value, "x")
    assert gene.low <= kept <= gene.high
    assert gene.validate(kept, "x") == kept
    assert gene.from_unit(gene.to_unit(kept)) == kept
    if gene.step is None:
        scale = abs(value) if gene.log else max(abs(gene.low), abs(gene.high))
        assert abs(kept - value) <= 1e-11 * scale


def test_bounds_that_logarithms_cannot_tell_apart() -> None:
    gene = Float(796864568.2544754, 796864568.2544755, log=True)
    kept = gene.validate(796864568.2544755, "x")
    assert gene.from_unit(gene.to_unit(kept)) == kept


@given(ints(), st.data())
def test_every_int_round_trips(gene: Int, data: st.DataObject) -> None:
    value = gene.low + gene.step * data.draw(st.integers(0, gene.count - 1))
    assert gene.validate(value, "x") == value
    assert gene.from_unit(gene.to_unit(value)) == value


def test_discrete_values_get_equal_shares_of_the_axis() -> None:
    grid = (np.arange(6000) + 0.5) / 6000
    for gene in (Int(1, 5), Int(0, 8, step=2), Float(0, 1, step=0.25), Categorical(*"abcde")):
        values = [gene.from_unit(unit) for unit in grid.tolist()]
        assert {values.count(value) for value in set(values)} == {1200}


def test_a_log_axis_gives_every_decade_the_same_room() -> None:
    values = np.array(
        [Float(1e-4, 1, log=True).from_unit(u) for u in ((np.arange(4000) + 0.5) / 4000).tolist()]
    )
    assert [int(((values >= 10**-k) & (values < 10 ** (1 - k))).sum()) for k in (4, 3, 2, 1)] == [1000] * 4
    assert Int(1, 128, log=True).from_unit(0.5) < 20


def test_starts() -> None:
    space = Space(
        {"a": Float(1e-4, 1, log=True), "b": Int(0, 10, init=7), "c": Categorical("x", "y", init="y")}
    )
    assert space.start() == {"a": pytest.approx(0.01), "b": 7, "c": "y"}


def test_rounding_at_a_bound_is_no_reason_to_refuse() -> None:
    gene = Float(0, 0.3, step=0.05)
    assert gene.validate(6 * 0.05, "x") == 0.3  # 0.30000000000000004
    with pytest.raises(SpaceError, match=r"0 <= x <= 0\.3"):
        gene.validate(0.3000001, "x")


def test_conditional_genes_are_none_and_chains_follow() -> None:
    space = Space(
        {"m": Categorical("a", "b"), "k": Categorical(1, 2), "x": Float(0, 1, init=0.2)},
        {"k": Condition("m", ("b",)), "x": Condition("k", (2,))},
    )
    assert space.validate({"m": "a", "k": 2, "x": 0.3}) == {"m": "a", "k": None, "x": None}
    assert space.validate({"m": "b", "k": 1}) == {"m": "b", "k": 1, "x": None}
    assert space.validate({"m": "b", "k": 2, "x": 0.3})["x"] == 0.3
    assert space.to_unit({"m": "a", "k": None, "x": None})[2] == pytest.approx(0.2)
    with pytest.raises(SpaceError, match="`x` is missing"):
        space.validate({"m": "b", "k": 2})


def test_true_and_one_are_different_choices() -> None:
    gene = Categorical(True, 1, 1.0, "1")
    assert [gene.index(value) for value in (True, 1, 1.0, "1")] == [0, 1, 2, 3]
    space = Space({"g": gene})
    assert len({space.key({"g": value}) for value in gene.choices}) == 4


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Float(1, 0), "low <= high"),
        (lambda: Float(0, math.inf), "finite"),
        (lambda: Float("0", 1), "numbers"),  # type: ignore[arg-type]
        (lambda: Float(0, 1, log=True), "low > 0"),
        (lambda: Float(1, 2, log=True, step=0.5), "exclude"),
        (lambda: Float(0, 1, step=0.3), "multiple of `step`"),
        (lambda: Float(0, 1, step=-1), "step > 0"),
        (lambda: Float(0, 1, init=2), "init"),
        (lambda: Int(0.5, 2), "whole number"),  # type: ignore[arg-type]
        (lambda: Int(0, 2**41), "2\\*\\*40"),
        (lambda: Int(0, 5, step=2), "multiple of `step`"),
        (lambda: Int(0, 5, log=True), "low >= 1"),
        (lambda: Categorical(), "must not be empty"),
        (lambda: Categorical("a", "a"), "distinct"),
        (lambda: Categorical([1], [2]), "name the choice"),  # type: ignore[arg-type]
        (lambda: Categorical(math.nan), "finite"),
        (lambda: Categorical("a", init="b"), "init"),
        (lambda: Space({}), "must not be empty"),
        (lambda: Space({"": Float(0, 1)}), "non-empty strings"),
        (lambda: Space({"x": (0, 1)}), "must be a Float"),  # type: ignore[dict-item]
        (lambda: Space({"x": Float(0, 1)}, {"y": Condition("x", (1,))}), "not a gene"),
        (lambda: Space({"x": Float(0, 1)}, {"x": Condition("x", (1,))}), "stands before it"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(make: Any, text: str) -> None:
    with pytest.raises(SpaceError, match=text):
        make()


def test_a_bad_point_names_the_gene_the_rule_and_the_value() -> None:
    space = Space({"rank": Int(4, 64), "lr": Float(1e-6, 1e-2, log=True), "t": Categorical("q", "v")})
    good: dict[str, object] = {"rank": 8, "lr": 1e-4, "t": "q"}
    for change, text in [
        ({"rank": 65}, "`4 <= rank <= 64` must hold, but got 65"),
        ({"rank": 8.5}, "`rank` must be a whole number, but got 8.5"),
        ({"rank": True}, "`rank` must be a whole number, but got True"),
        ({"lr": math.nan}, "`lr` must be a finite number"),
        ({"t": "k"}, r"`t` must be one of \['q', 'v'\], but got 'k'"),
        ({"ranks": 8}, "did you mean 'rank'"),
    ]:
        with pytest.raises(SpaceError, match=text):
            space.validate({**good, **change})
    for unit in ([0.5, 0.5], [0.5, math.nan, 0.5]):
        with pytest.raises(SpaceError, match="3 numbers without NaN"):
            space.from_unit(unit)
