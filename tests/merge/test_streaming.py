"""Models that do not fit the device: the staged merge against the resident one, and where the plan puts what.

No GPU is needed: the staged path runs on the CPU as well, without a stream of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_buffers import buffers

from llmevo.errors import GenomeError
from llmevo.genome import MergeSpec
from llmevo.merge import Merger, memory, merger
from llmevo.runner import facts

torch = pytest.importorskip("torch")

from llmevo.merge.magnitudes import Magnitudes  # noqa: E402
from llmevo.merge.references import locate  # noqa: E402
from llmevo.merge.streamed_engine import StreamedEngine  # noqa: E402
from llmevo.merge.torch_engine import TorchEngine  # noqa: E402
from llmevo.merge.works import Masked, Product, Sum, Term, Work  # noqa: E402

CPU = torch.device("cpu")


def _works(arena: Any, slots: Any, engine: Any, columns: int) -> list[Work]:
    """One of each kind."""
    out, base, *models = slots
    weights = tuple(0.3 + 0.2 * i for i in range(len(models)))
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(*s, generator=generator) for s in ((600 // columns, 5), (5, columns)))
    term = Term(arena.slot(up), arena.slot(down), 5, 0.1)
    works: list[Work] = [Sum(out, tuple(models), weights), Sum(out, tuple(models), weights, base)]
    works.append(Product(works[1], (term,), columns))  # type: ignore[arg-type]
    ranks = arena.slot(torch.randint(0, 256, (600,), generator=generator).to(torch.uint8))
    for kind in ("largest", "drawn", "by_rank"):
        known = [Magnitudes(engine, base, m, (3, i), ranks) for i, m in enumerate(models)]
        extra = (0.2,) if kind == "by_rank" else ()
        masks = tuple(getattr(k, kind)(0.4, *extra, rescale=True) for k in known)
        works.append(Masked(out, base, tuple(models), weights, masks, True, True, 0.9))
    return works


@settings(deadline=None, max_examples=12)
@given(
    count=st.integers(1, 4),
    block=st.sampled_from([1, 64, 100, 10_000]),
    columns=st.sampled_from([1, 20, 600]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 9),
)
def test_staged_blocks_give_the_same_bits(count, block, columns, dtype, seed) -> None:
    results = []
    for staged in (False, True):
        arena, slots = buffers(600, count, dtype=dtype, seed=seed)
        output = arena.buffers[0]
        engine: Any = TorchEngine(arena, block)
        if staged:
            engine = StreamedEngine(arena, CPU, block, far=lambda buffer, near=output: buffer is not near)
        for work in _works(arena, slots, engine, columns):
            output.zero_()
            assert engine.run([work]) == []
            results.append(output.clone())
    half = len(results) // 2
    assert all(torch.equal(a, b) for a, b in zip(results[:half], results[half:], strict=True))
    assert all(bool(result.any()) for result in results)


def test_staged_blocks_say_what_is_not_finite() -> None:
    arena, slots = buffers(600, 1)
    arena.buffers[2][599] = 3e38
    engine = StreamedEngine(arena, CPU, 100, far=lambda _: True)
    assert engine.run([]) == []
    works = [Sum(slots[0], (slots[2],), (weight,)) for weight in (1.0, 4.0, 0.5)]
    assert engine.run(works) == [1]


@pytest.mark.parametrize(
    ("method", "adapted"),
    [("linear", True), ("task_arithmetic", False), ("ties", True), ("dare_linear", False), ("della", False)],
)
def test_a_model_merged_through_staging(tiny_llamas, loras, monkeypatch, method: str, adapted: bool) -> None:
    base = str(tiny_llamas.base)
    models = [f"{base}+{lora}" for lora in loras] if adapted else [str(p) for p in tiny_llamas.parents]
    spec = MergeSpec(models=models, base_model=base, merge_method=method)
    own = {"density": 0.5} if method not in ("linear", "task_arithmetic") else {}
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": m, "parameters": {"weight": [0.9, 0.2], **own}} for m in models],
        "dtype": "bfloat16",
        **({} if method == "linear" else {"base_model": base}),
    }
    states = []
    for staged in (False, True):

        def engine(arena: Any, device: Any, *, streamed: bool, staged: bool = staged) -> Any:
            near = arena.buffers[0]
            return (
                StreamedEngine(arena, device, 3000, far=lambda b: b is not near)
                if staged
                else TorchEngine(arena, 3000)
            )

        monkeypatch.setattr(merger, "engine_for", engine)
        made = Merger(spec)
        assert made.merge(recipe, seed=3) == made.facts["bytes"]
        states.append(made.model.state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def _plan(spec: MergeSpec, monkeypatch: Any, gpu: int, host: int, wanted: Any = "auto") -> dict[str, Any]:
    monkeypatch.setattr(memory, "available", lambda device: gpu if device.type == "cuda" else host)
    return memory.plan(
        {name: locate(name) for name in [spec.base_model, *spec.models]},
        dtype=torch.bfloat16,
        resident_dtype=torch.bfloat16,
        device=torch.device("cuda"),
        memory=wanted,
        ranked=spec.models if spec.merge_method == "della" else (),
    )


def test_the_plan_for_a_gpu(tiny_llamas, monkeypatch) -> None:
    """In its memory, in main memory, in the files; and refused where the merged model has no room."""
    models = [str(p) for p in tiny_llamas.parents]
    spec = MergeSpec(models=models, base_model=str(tiny_llamas.base), merge_method="della")
    plan = _plan(spec, monkeypatch, 10**9, 10**9)
    one = plan["merged"]
    assert (plan["mode"], plan["needed"], plan["staging"]) == ("resident", 5 * one + plan["ranks"], 0)
    assert plan["ranks"] == 3 * one // 2
    assert {model["where"] for model in plan["models"].values()} == {"cuda"}
    monkeypatch.setattr(memory, "BLOCK", 1000)
    for host, where in ((10 * one, "host"), (2 * one, "file")):
        plan = _plan(spec, monkeypatch, 4 * one, host)
        assert (plan["mode"], plan["needed"]) == ("streamed", one + 2 * 4 * 1000 * 2)
        assert {model["where"] for model in plan["models"].values()} == {where}
    assert _plan(spec, monkeypatch, 10**9, 10**9, "streamed")["mode"] == "streamed"
    with pytest.raises(GenomeError, match=r"`merge\.memory` is resident, but"):
        _plan(spec, monkeypatch, 4 * one, 10**9, "resident")
    with pytest.raises(GenomeError, match=r"`evaluate\.device`: the merged model and what is copied"):
        _plan(spec, monkeypatch, one, 10**9)


def test_what_is_rounded_before_a_merge_is_said(tiny_llamas, make_tiny_llama, tmp_path: Path) -> None:
    wide = make_tiny_llama(tmp_path / "wide", seed=5, start=tiny_llamas.base, dtype="float32")
    models = [str(tiny_llamas.parents[0]), str(wide)]
    said = [
        facts.lines({"memory": Merger(MergeSpec(models=models, dtype=dtype)).memory}, None)
        for dtype in ("bfloat16", "float32")
    ]
    assert said[0][1:] == ["rounded: 1 model with tensors in float32, as `genome.dtype` is bfloat16"]
    assert len(said[1]) == 1  # nothing is lost
