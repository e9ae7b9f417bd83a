"""Merged models that are kept: the bits of a merge, taken up without one, as far as memory is free."""

from __future__ import annotations

from typing import Any

import pytest

from llmevo.errors import StageError
from llmevo.genome import MergeSpec, MergeStageSpec
from llmevo.merge import Merger, memory

torch = pytest.importorskip("torch")


def linear(spec: MergeSpec, at: float, method: str = "linear") -> dict[str, Any]:
    models = [{"model": m, "parameters": {"weight": [at, 0.3 + i]}} for i, m in enumerate(spec.models)]
    recipe = {"merge_method": method, "models": models, "dtype": spec.dtype}
    return recipe if method == "linear" else recipe | {"base_model": spec.base_model}


def bits(merger: Merger) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in merger.model.state_dict().items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def merge(merger: Merger, recipe: dict[str, Any], **options: Any) -> int:
    return merger.merge(recipe, seed=1, name=merger.identity(recipe, 1, **options), **options)


@pytest.mark.parametrize("engine", ["numba", "torch"])
@pytest.mark.parametrize("resident", ["float32", "bfloat16"])
def test_what_is_kept_has_the_bits_of_a_merge(
    spec: MergeSpec, monkeypatch: pytest.MonkeyPatch, engine: str, resident: str
) -> None:
    from llmevo.merge import merger as module
    from llmevo.merge.torch_engine import TorchEngine

    if engine == "torch":
        monkeypatch.setattr(module, "engine_for", lambda arena, *_, **__: TorchEngine(arena, 3000))
    keeping, plain = Merger(spec, dtype=resident), Merger(spec, dtype=resident)
    assert keeping.keep(2) == 2
    recipes = [linear(spec, at, method) for at in (0.2, 0.5, 0.9) for method in ("linear", "ties")]
    exact = [False, True, False, False, True, False]
    objects = [id(p) for p in keeping.model.parameters()]
    taken_up = 0
    # Three models have room: the latest are there, and whatever is written over lay there before.
    for index in (0, 1, 2, 2, 1, 0, 3, 4, 5, 4, 3, 0, 5, 1, 2, 1):
        written = merge(keeping, recipes[index], exact=exact[index])
        plain.merge(recipes[index], seed=1, exact=exact[index])
        taken_up += not written
        assert same(bits(keeping), bits(plain)), index
        tokens = torch.arange(5)[None]
        assert torch.equal(keeping.model(tokens).logits, plain.model(tokens).logits)
    assert taken_up == 3 + 2 + 1
    assert objects == [id(p) for p in keeping.model.parameters()]
    assert keeping.model.lm_head.weight.data_ptr() == keeping.model.model.embed_tokens.weight.data_ptr()


def test_the_model_in_use_is_taken_up_without_room_for_others(spec: MergeSpec) -> None:
    merger = Merger(spec)
    one, other = linear(spec, 0.2), linear(spec, 0.7)
    pointers = [p.data_ptr() for p in merger.model.parameters()]
    assert merge(merger, one, exact=True) == merger.facts["bytes"]
    assert merge(merger, one, exact=True) == 0
    assert merge(merger, other) == merger.facts["bytes"]
    assert merge(merger, one, exact=True) == merger.facts["bytes"]
    assert pointers == [p.data_ptr() for p in merger.model.parameters()]
    assert "kept" not in merger.memory


@pytest.mark.parametrize("room", [0, 3])
def test_a_merge_without_a_name_is_not_found(spec: MergeSpec, room: int) -> None:
    merger = Merger(spec)
    merger.keep(room)
    one, other = linear(spec, 0.2, "ties"), linear(spec, 0.7, "ties")
    merge(merger, one)
    expected = bits(merger)
    assert merger.merge(other, 1) > 0
    assert not same(bits(merger), expected)
    assert (merge(merger, one) == 0) == (room > 0)  # without room, it was written over
    assert same(bits(merger), expected)
    assert merge(merger, other) > 0


def test_a_failed_merge_is_not_taken_up(spec: MergeSpec) -> None:
    merger = Merger(spec)
    merger.keep(1)
    good, bad = linear(spec, 0.2), linear(spec, 3e38) | {"parameters": {"normalize": False}}
    merge(merger, good)
    expected = bits(merger)
    for _ in range(2):
        with pytest.raises(StageError, match="NaN or infinite"):
            merge(merger, bad)
    assert merge(merger, good) == 0
    assert same(bits(merger), expected)
    again = linear(spec, 0.4)  # where the failed one had been written in part
    assert merge(merger, again) == merger.facts["bytes"]
    one = bits(merger)
    assert merger.merge(again, 1, exact=True) == merger.facts["bytes"]
    assert all(torch.allclose(one[name], tensor, atol=0.02) for name, tensor in bits(merger).items())


def test_only_a_quarter_of_the_free_memory_is_taken(spec: MergeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    merger = Merger(spec)
    one = merger.memory["merged"]
    for free, workers, room in (
        (None, 1, 0),
        (0, 1, 0),
        (4 * one - 1, 1, 0),
        (4 * one, 1, 1),
        (19 * one, 1, 4),
        (19 * one, 2, 2),
        (19 * one, 5, 0),
        (100 * one, 1, 9),
    ):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        assert merger.keep(9, workers) == room
        assert merger.memory["kept"] == {"models": room, "bytes": room * one}
    plan = {"device": "cuda", "mode": "resident", "merged": one}
    assert memory.keepable(plan, 9, 1) == 0
    monkeypatch.setattr(memory, "available", lambda device: 1000 * one)
    streamed = Merger(spec, MergeStageSpec(memory="streamed"))
    assert streamed.keep(9) == 0


def test_where_no_memory_is_left_after_all_the_oldest_goes(
    spec: MergeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmevo.merge import kept

    merger, real, made = Merger(spec), kept.like, []

    def full(buffer: Any) -> Any:
        if len(made) == 1:
            raise MemoryError
        made.append(buffer)
        return real(buffer)

    monkeypatch.setattr(kept, "like", full)
    merger.keep(5)
    recipes = [linear(spec, at) for at in (0.1, 0.4, 0.8)]
    written = [merge(merger, recipes[index]) for index in (0, 1, 2, 1, 2, 0, 2)]
    assert [count == 0 for count in written] == [False, False, False, True, True, False, True]
