"""What a model sees of a point and what is made of its answer: both ways, and everything in between."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmevo import Categorical, Condition, Float, Int, Space
from llmevo.llm.decode import decode
from llmevo.llm.encode import encode, encode_value, is_native, labels, level_key, names, schema, text

SPACE = Space(
    {
        "lr": Float(1e-6, 1e-2, log=True, init=1e-4),
        "rank": Int(4, 128, log=True, init=16),
        "method": Categorical("linear", "ties"),
        "density": Float(0.1, 1.0),
        "flag": Categorical(True, False),
    },
    {"density": Condition("method", ("ties",))},
)
BEST = SPACE.validate({"lr": 1e-3, "rank": 32, "method": "ties", "density": 0.55, "flag": False})
BEST_SHOWN = {"lr": 75, "rank": 32, "method": "ties", "density": 50, "flag": "false"}


@st.composite
def genes(draw: st.DrawFn) -> Float | Int | Categorical:
    kind = draw(st.sampled_from(["float", "log", "grid", "int", "wide", "logint", "choice"]))
    if kind == "float":
        low = draw(st.floats(-1e3, 1e3))
        return Float(low, low + draw(st.floats(0.01, 1e4)))
    if kind == "log":
        low = draw(st.floats(1e-8, 1.0))
        return Float(low, low * draw(st.floats(1.5, 1e6)), log=True)
    if kind == "grid":
        return Float(0.0, 0.25 * draw(st.integers(1, 400)), step=0.25)
    if kind == "int":
        low = draw(st.integers(-50, 50))
        return Int(low, low + draw(st.integers(0, 200)))
    if kind == "wide":
        return Int(0, draw(st.integers(10_000, 2**39)))
    if kind == "logint":
        return Int(1, draw(st.integers(2, 10**7)), log=True)
    values = st.one_of(st.text(max_size=80), st.integers(), st.booleans(), st.none())
    return Categorical(*draw(st.lists(values, min_size=1, max_size=6, unique_by=lambda v: (str(type(v)), v))))


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    named = {f"gene{i}": gene for i, gene in enumerate(draw(st.lists(genes(), min_size=1, max_size=5)))}
    return Space({"switch": Categorical("on", "off"), **named}, {"gene0": Condition("switch", ("on",))})


@settings(max_examples=200, deadline=None)
@given(space=spaces(), seed=st.integers(0, 2**32 - 1))
def test_shown_points_come_back(space: Space, seed: int) -> None:
    """Decoding what is shown gives the same point to within half a level, and is idempotent from then on."""
    point = space.sample(np.random.default_rng(seed))
    reply = json.dumps({"proposals": [{"genome": encode(space, point)}]})
    decoded = decode(space, reply)
    assert decoded.problem is None
    assert not any(value for key, value in decoded.counts.items() if key != "missing")
    (back,) = decoded.points
    for name, gene in space.genes.items():
        assert (back[name] is None) == (point[name] is None)
        if isinstance(gene, Categorical) or is_native(gene):
            assert back[name] == point[name]
            assert type(back[name]) is type(point[name])
        elif back[name] is not None:
            distance = abs(gene.to_unit(back[name]) - gene.to_unit(point[name]))  # type: ignore[arg-type]
            cell = 0.0 if gene.count is None else 1 / gene.count
            wide = 0.5 if isinstance(gene, Int) and gene.log else cell  # cells of unequal width
            assert distance <= 0.005 + wide + 1e-9
    (again,) = decode(space, json.dumps([{"genome": encode(space, back)}])).points
    assert again == back


@settings(max_examples=100, deadline=None)
@given(space=spaces(), seed=st.integers(0, 2**32 - 1))
def test_shown_points_fulfil_the_schema(space: Space, seed: int) -> None:
    form = schema(space, 1, why=False)
    genome = form["properties"]["proposals"]["items"]["properties"]["genome"]
    shown = encode(space, space.sample(np.random.default_rng(seed)))
    assert genome["required"] == list(shown)
    kinds = {"string": str, "integer": int, "number": (int, float), "null": type(None)}
    for key, value in shown.items():
        node = genome["properties"][key]
        allowed = node["type"] if isinstance(node["type"], list) else [node["type"]]
        assert any(isinstance(value, kinds[kind]) for kind in allowed)
        assert value in node.get("enum", [value])
        if value is not None and "minimum" in node:
            assert node["minimum"] <= value <= node["maximum"]


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*SPACE.names, "x"]), inner),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(proposals=junk, around=st.sampled_from(["{}", "```json\n{}\n```", "Sure! {} Good luck.", "{}"]))
def test_whatever_comes_gives_valid_points_or_a_problem(proposals: Any, around: str) -> None:
    body = json.dumps({"proposals": proposals})
    decoded = decode(SPACE, around.replace("{}", body), BEST)
    assert (decoded.problem is None) == bool(decoded.points)
    for point in decoded.points:
        assert SPACE.validate(point) == point


@settings(max_examples=200, deadline=None)
@given(reply=st.text(alphabet='{}[]":,0123456789.eNaInfty \\genompsl', max_size=200))
def test_any_text_is_survived(reply: str) -> None:
    for point in decode(SPACE, reply, BEST).points:
        assert SPACE.validate(point) == point


def one(genome: Any) -> tuple[dict[str, Any], dict[str, int]]:
    decoded = decode(SPACE, json.dumps({"proposals": [{"genome": genome}]}), BEST)
    assert len(decoded.points) == 1
    return dict(decoded.points[0]), {key: value for key, value in decoded.counts.items() if value}


def test_encoding_by_hand() -> None:
    assert encode(SPACE, BEST) == BEST_SHOWN
    assert text(encode(SPACE, BEST)) == '{"lr":75,"rank":32,"method":"ties","density":50,"flag":"false"}'
    linear = SPACE.validate({**BEST, "method": "linear"})
    assert encode(SPACE, linear)["density"] is None


@pytest.mark.parametrize(
    ("change", "name", "value", "counts"),
    [
        ({"lr": 100}, "lr", 1e-2, {}),
        ({"lr": 50.0}, "lr", 1e-4, {}),
        ({"lr": "50"}, "lr", 1e-4, {}),
        ({"lr": 900}, "lr", 1e-2, {"clipped": 1}),
        ({"lr": -3}, "lr", 1e-6, {"clipped": 1}),
        ({"rank": 7.6}, "rank", 8, {}),
        ({"rank": 10**400}, "rank", 32, {"wrong_type": 1}),
        ({"lr": None}, "lr", 1e-3, {"missing": 1}),
        ({"lr": True}, "lr", 1e-3, {"wrong_type": 1}),
        ({"lr": [50]}, "lr", 1e-3, {"wrong_type": 1}),
        ({"method": "TIES "}, "method", "ties", {}),
        ({"method": "slerp"}, "method", "ties", {"wrong_type": 1}),
        ({"flag": True}, "flag", True, {}),
        ({"flag": "True"}, "flag", True, {}),
        ({"rnak": 8}, "rank", 32, {"unknown": 1}),
        ({"method": "linear", "density": 99}, "density", None, {}),
    ],
)
def test_repairs_are_counted(
    change: dict[str, Any], name: str, value: object, counts: dict[str, int]
) -> None:
    point, counted = one({**BEST_SHOWN, **change})
    assert point[name] == (pytest.approx(value) if isinstance(value, float) else value)
    assert type(point[name]) is type(value)
    assert counted == counts


def test_missing_values_come_from_the_best_or_the_start() -> None:
    point, counts = one({"rank": 64})
    assert point == {**BEST, "rank": 64}
    assert counts == {"missing": 4}
    (fresh,) = decode(SPACE, '{"genome": {"rank": 64}}').points
    assert fresh == {**SPACE.start(), "rank": 64}


def test_a_gene_that_becomes_active_starts_at_its_init() -> None:
    linear = SPACE.validate({**BEST, "method": "linear"})
    (point,) = decode(SPACE, '[{"method": "ties"}]', linear).points
    assert point["density"] == SPACE.genes["density"].start


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_not_json_constants_are_refused(constant: str) -> None:
    assert decode(SPACE, '{"proposals":[{"genome":{"lr":' + constant + "}}]}").problem == "no_json"


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("", "no_json"),
        ("I would try a higher rank.", "no_json"),
        ('{"proposals":[{"genome":{"lr":5', "no_json"),
        ('{"proposals":[]}', "no_genome"),
        ('{"proposals":[{"genome":{"a":1}}, 3]}', "no_genome"),
        ("[" * 100_000, "no_json"),
        ('{"a":' * 50_000, "no_json"),
        ("x" * 10_000_000, "too_long"),
    ],
)
def test_problems(reply: str, problem: str) -> None:
    assert decode(SPACE, reply).problem == problem


def test_thinking_and_prose_are_passed_over() -> None:
    answer = '{"proposals":[{"genome":{"rank":%d}}]}'
    reply = f"<think>maybe {answer % 4}</think> Here: {answer % 64}"
    (point,) = decode(SPACE, reply, BEST).points
    assert point["rank"] == 64


def test_labels_and_names_are_distinct() -> None:
    assert labels(Categorical("a", 1, True, None)) == ["a", "1", "true", "null"]
    assert labels(Categorical("1", 1)) == ['"1"', "1"]
    assert len(set(labels(Categorical("x" * 70, "x" * 80)))) == 2
    space = Space({"g1": Float(0, 1), "a" * 60: Float(0, 1), "ünïcode": Float(0, 1)})
    assert len(set(names(space).values())) == 3
    assert encode_value(Categorical(None, "a"), None) == "null"


def test_a_copy_has_the_key_of_the_original() -> None:
    near = {**BEST, "lr": 1.001e-3}
    assert level_key(SPACE, near) == level_key(SPACE, BEST)
    assert SPACE.key(near) != SPACE.key(BEST)
