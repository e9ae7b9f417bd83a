"""Masked methods in the fast mode: thresholds against mergekit's, random masks against their distribution."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_buffers import buffers

from llmevo.errors import StageError
from llmevo.genome import MergeSpec
from llmevo.merge import Merger

torch = pytest.importorskip("torch")

from llmevo.merge.layout import Arena, Slot  # noqa: E402
from llmevo.merge.magnitudes import Magnitudes, rounded  # noqa: E402
from llmevo.merge.numba_engine import NumbaEngine  # noqa: E402
from llmevo.merge.torch_engine import TorchEngine, noise  # noqa: E402
from llmevo.merge.works import Mask, Masked, Sum  # noqa: E402


def _delta(arena: Arena, slots: list[Slot], model: int = 0) -> Any:
    return (arena.buffers[2 + model].float() - arena.buffers[1].float()).to(arena.buffers[1].dtype)


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _known(engine: Any, slots: list[Slot], dtype: Any, key: tuple[int, int] = (0, 0)) -> Magnitudes:
    return Magnitudes(engine, slots[1], slots[2], key, dtype=str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("engine", [NumbaEngine, TorchEngine])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.97])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_is_the_kth_magnitude(engine, density: float, dtype: Any) -> None:
    """All of mergekit's mask, and beside it only elements that equal its smallest."""
    from mergekit.sparsify import magnitude

    arena, slots = buffers(5000, 1, dtype=dtype)
    delta = _delta(arena, slots)
    theirs = magnitude(delta.clone(), density) != 0
    mask = _known(engine(arena), slots, dtype).largest(density, rescale=False)
    bits = delta.abs().float().view(torch.int32)
    ours = bits >= mask.low
    assert bool((ours | ~theirs).all())
    assert set(bits[ours & ~theirs].tolist()) <= {mask.low}
    assert int(theirs.sum()) == max(1, int(density * 5000))


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.2), (0.3, 0.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_breadcrumbs_window(density: float, gamma: float, dtype: Any) -> None:
    from mergekit.sparsify import magnitude_outliers

    arena, slots = buffers(5000, 1, dtype=dtype)
    delta = _delta(arena, slots)
    theirs = magnitude_outliers(delta.clone(), density, gamma=gamma) != 0
    mask = _known(NumbaEngine(arena), slots, dtype).middle(density, gamma, rescale=False)
    bits = delta.abs().float().view(torch.int32)
    ours = (bits >= mask.low) & (bits <= mask.high)
    assert bool((ours | ~theirs).all())
    assert set(bits[ours & ~theirs].tolist()) <= {mask.low, mask.high}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["largest", "drawn"])
def test_rescaling_keeps_the_sum_of_magnitudes(dtype: Any, kind: str) -> None:
    """By mergekit's factor, which has the models' precision; elements equal to the threshold all count."""
    from mergekit.sparsify import RescaleNorm, magnitude

    arena, slots = buffers(3000, 1, dtype=dtype)
    delta = _delta(arena, slots)
    mask = getattr(_known(NumbaEngine(arena), slots, dtype, (1, 2)), kind)(0.3, rescale=True)
    if kind == "largest":
        theirs = magnitude(delta, 0.3, RescaleNorm.l1) / magnitude(delta, 0.3)
        wanted = float(theirs[theirs.isfinite()].double().median())
    else:
        kept = NumbaEngine(arena).kept_mass(slots[1], slots[2], mask)
        wanted = float(delta.abs().double().sum()) / kept
    assert mask.scale == pytest.approx(
        wanted, rel={torch.bfloat16: 2**-6, torch.float16: 2**-7}.get(dtype, 2**-20)
    )


def _kept(arena: Arena, slots: list[Slot], mask: Mask) -> Any:
    work = Masked(slots[0], slots[1], (slots[2],), (1.0,), (mask,), False, False, 1.0)
    NumbaEngine(arena, threads=1).run([work])
    return arena.buffers[0] != arena.buffers[1]


def test_random_masks_keep_their_share_without_bias_and_are_nested() -> None:
    arena, slots = buffers(200_000, 1)
    arena.buffers[2].copy_(arena.buffers[1] + 1)  # a difference that shows everywhere
    known = Magnitudes(NumbaEngine(arena), slots[1], slots[2], (17, 23))
    masks = {p: _kept(arena, slots, known.drawn(p, rescale=False)) for p in (0.1, 0.5, 0.9)}
    for p, kept in masks.items():
        wanted = rounded(p)
        assert abs(float(kept.float().mean()) - wanted) < 4 * (wanted * (1 - wanted) / 200_000) ** 0.5
    assert bool((masks[0.5] | ~masks[0.1]).all())
    assert bool((masks[0.9] | ~masks[0.5]).all())
    # Neighbours, halves and other keys are independent: agreement is as of fair coins.
    half = masks[0.5]
    elsewhere = Magnitudes(NumbaEngine(arena), slots[1], slots[2], (18, 23))
    other = _kept(arena, slots, elsewhere.drawn(0.5, rescale=False))
    for a, b in ((half[1:], half[:-1]), (half[:100_000], half[100_000:]), (half, other)):
        assert abs(float((a == b).float().mean()) - 0.5) < 4 * 0.5 / len(a) ** 0.5
    again = _kept(arena, slots, known.drawn(0.5, rescale=False))
    assert torch.equal(half, again)


@pytest.mark.parametrize("size", [600, 150_000])
def test_dare_keeps_the_magnitude_of_the_whole(size: int) -> None:
    """As mergekit rescales: by what was kept. Small tensors exactly, large ones to 0.1 %."""
    arena, slots = buffers(size, 1)
    known = Magnitudes(NumbaEngine(arena), slots[1], slots[2], (1, 2))
    mask = known.drawn(0.37, rescale=True)
    kept = known._engine.kept_mass(slots[1], slots[2], mask)
    whole = float(_delta(arena, slots).abs().double().sum())
    assert mask.scale == pytest.approx(whole / kept, rel=2**-7)
    if size > 1 << 16:
        assert known._mass_below(mask) == pytest.approx(kept, rel=1e-3)


def test_della_keeps_large_differences_more_often() -> None:
    arena, slots = buffers(100_000, 1)
    delta = _delta(arena, slots).abs().float()
    order = delta.view(100, 1000).argsort(dim=1).argsort(dim=1)
    ranks = arena.slot((order * 255 / 999).round().to(torch.uint8).view(-1))
    known = Magnitudes(NumbaEngine(arena), slots[1], slots[2], (5, 6), ranks)
    mask = known.by_rank(0.5, 0.3, rescale=False)
    arena.buffers[2].copy_(arena.buffers[1] + 1)
    kept = _kept(arena, slots, mask).view(100, 1000).float()
    low, high = kept[order < 100].mean(), kept[order >= 900].mean()
    assert float(kept.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(low) == pytest.approx(0.5 - 0.3 * 0.9, abs=0.02)
    assert float(high) == pytest.approx(0.5 + 0.3 * 0.9, abs=0.02)


@settings(deadline=None, max_examples=40)
@given(
    # Each is compiled by itself, which takes seconds.
    form=st.sampled_from(
        [
            (1, torch.bfloat16, False),
            (3, torch.bfloat16, True),
            (2, torch.float16, False),
            (2, torch.float32, False),
        ]
    ),
    elect=st.booleans(),
    normalize=st.booleans(),
    factor=st.floats(-2, 2, width=32),
    seed=st.integers(0, 99),
    densities=st.lists(st.floats(0, 1.1), min_size=5, max_size=5),
    weights=st.lists(st.floats(-1, 1, width=16), min_size=5, max_size=5),
    kind=st.sampled_from(["largest", "middle", "drawn"]),
)
def test_engines_agree(form, elect, normalize, factor, seed, densities, weights, kind) -> None:
    """numba and torch: the same masks, the same signs, sums within one rounding."""
    count, dtype, wide = form
    results = []
    for engine in (NumbaEngine, TorchEngine):
        arena, slots = buffers(700, count, seed=seed, dtype=dtype)
        if wide:
            slots[0] = arena.slot(torch.zeros(700))
        runner = engine(arena)
        masks = []
        for j in range(count):
            known = _known(runner, [*slots[:2], slots[2 + j]], dtype, (seed, j))
            extra = {"gamma": 0.05} if kind == "middle" else {}
            masks.append(getattr(known, kind)(densities[j], rescale=True, **extra))
        used = tuple(rounded(w) for w in weights[:count])
        work = Masked(slots[0], slots[1], tuple(slots[2:]), used, tuple(masks), elect, normalize, factor)
        runner.run([work])
        results.append((arena.buffers[slots[0].buffer].float(), masks))
    (a, masks_a), (b, masks_b) = results
    for one, other in zip(masks_a, masks_b, strict=True):
        assert replace(one, scale=1.0) == replace(other, scale=1.0)
        # Sums of magnitudes differ in their last bits.
        assert one.scale == (other.scale if dtype == torch.bfloat16 else pytest.approx(other.scale, rel=2e-3))
    finite = torch.isfinite(a) & torch.isfinite(b)
    assert torch.equal(torch.isfinite(a), torch.isfinite(b))
    assert bool(((a - b).abs() <= 2**-7 * b.abs() + 1e-6)[finite].all())


@settings(deadline=None, max_examples=40)
@given(
    count=st.sampled_from([2, 5]),
    pair=st.sampled_from(
        [
            (torch.bfloat16, torch.bfloat16),
            (torch.float32, torch.bfloat16),
            (torch.float16, torch.float16),
        ]
    ),
    shifts=st.booleans(),
    weights=st.lists(st.floats(-2, 2, width=16), min_size=6, max_size=6),
)
def test_engines_agree_on_sums(count, pair, shifts, weights) -> None:
    parents, out = pair
    results = []
    for engine in (NumbaEngine, TorchEngine):
        arena, slots = buffers(5000, count, dtype=parents)
        target = arena.slot(torch.zeros(5000, dtype=out))
        base = slots[1] if shifts else None
        assert engine(arena).run([Sum(target, tuple(slots[2:]), tuple(weights[:count]), base)]) == []
        results.append(arena.buffers[target.buffer].double())
    exact = sum(w * arena.buffers[s.buffer].double() for w, s in zip(weights, slots[2:], strict=False))
    if shifts:
        origin = arena.buffers[1].double()
        exact = exact + (1 - sum(weights[:count])) * origin
    coarse = torch.bfloat16 in (parents, out) or torch.float16 in (parents, out)
    near = (2**-8 if coarse else 2**-21) * exact.abs() + (1e-3 if coarse else 1e-6)
    assert all(bool(((result - exact).abs() <= near).all()) for result in results)
    step = (2**-7 if coarse else 2**-20) * results[0].abs() + 1e-6
    assert bool(((results[0] - results[1]).abs() <= step).all())


def test_noise_is_the_same_in_both_engines() -> None:
    from llmevo.merge import mask_kernels

    arena, slots = buffers(4096, 1)
    arena.buffers[2].copy_(arena.buffers[1] + 1)
    table = np.zeros(256)
    views = [arena.buffers[i].view(torch.uint16).numpy() for i in (1, 2)]
    mask_kernels.mass_by_noise(*views, np.uint32(7), np.uint32(2**32 - 9), table)
    theirs = TorchEngine(arena).mass_by_noise(slots[1], slots[2], (7, 2**32 - 9), 256)
    assert np.allclose(table, theirs)
    assert int(noise(5, 1, (7, 9), "cpu")) == int(noise(0, 6, (7, 9), "cpu")[5])


def _recipe(spec: MergeSpec, method: str, **parameters: Any) -> dict[str, Any]:
    models = [
        {"model": m, "parameters": {"weight": [0.3 - 0.4 * i, 0.8], **parameters}}
        for i, m in enumerate(spec.models)
    ]
    base = {"base_model": spec.base_model, "dtype": "bfloat16"}
    return {"merge_method": method, "models": models, "parameters": {}, **base}


def _state(merger: Merger) -> Any:
    return torch.cat([p.detach().flatten() for p in merger.model.parameters()]).double()


@pytest.fixture(scope="module", params=["float16", "float32"])
def fine(request, make_tiny_llama, tmp_path_factory) -> tuple[MergeSpec, Merger]:
    """Models of more than bfloat16's precision."""
    root = tmp_path_factory.mktemp(request.param)
    base = make_tiny_llama(root / "base", seed=3, dtype=request.param)
    models = [
        make_tiny_llama(root / f"p{i}", seed=i, start=base, dtype=request.param, noise=0.01) for i in (1, 2)
    ]
    made = MergeSpec(models=[str(m) for m in models], base_model=str(base), dtype=request.param)
    return made, Merger(made, dtype=request.param)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": [0.4, 0.7]}),
        ("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
        ("breadcrumbs_ties", {"density": [0.9, 0.3], "gamma": 0.02}),
    ],
)
def test_windows_in_finer_models(fine, method: str, parameters: dict[str, Any]) -> None:
    """float16 and float32: mergekit's weights within its rounding, but for elements at a threshold."""
    spec, merger = fine
    recipe = _recipe(spec, method, **parameters) | {"dtype": spec.dtype}
    merger.merge(recipe, seed=0, exact=True)
    exact = _state(merger)
    merger.merge(recipe, seed=0)
    near = (2**-9 if spec.dtype == "float16" else 2**-20) * (exact.abs() + 0.05)
    assert float(((_state(merger) - exact).abs() > near).double().mean()) < 0.002
    assert merger.identity(recipe, 0) != merger.identity(recipe, 0, exact=True)


@pytest.mark.parametrize("method", ["dare_ties", "della_linear"])
def test_random_methods_in_finer_models(fine, method: str) -> None:
    """Over a few seeds, what is kept has the mean and the spread that mergekit's has."""
    spec, merger = fine
    recipe = _recipe(spec, method, density=0.6) | {"dtype": spec.dtype}
    draws: dict[bool, list[Any]] = {False: [], True: []}
    for exact, rows in draws.items():
        for seed in range(4):
            merger.merge(recipe, seed=seed, exact=exact)
            rows.append(_state(merger))
    fast, theirs = (torch.stack(draws[exact]) for exact in (False, True))
    assert float((fast.mean(0) - theirs.mean(0)).abs().mean()) < float(theirs.std(0).mean())
    assert float(fast.std(0).mean()) == pytest.approx(float(theirs.std(0).mean()), rel=0.03)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {}),
        ("ties", {"density": 0.4}),
        ("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
        ("breadcrumbs_ties", {"density": [0.9, 0.3], "gamma": 0.02}),
    ],
)
def test_windows_in_a_model(spec, merger, method: str, parameters: dict[str, Any], rescale: bool) -> None:
    """Apart from elements that equal a threshold, the weights are mergekit's within their rounding."""
    recipe = _recipe(spec, method, **parameters)
    recipe["parameters"] = {"rescale": rescale, "lambda": 0.9}
    merger.merge(_recipe(spec, "task_arithmetic", weight=0.0), seed=0)
    origin = _state(merger)
    merger.merge(recipe, seed=0, exact=True)
    exact = _state(merger)
    merger.merge(recipe, seed=0)
    fast = _state(merger)
    # bfloat16 has 8 bits, and mergekit rounds the sum, the quotient, the product and the result.
    near = 2**-7 * exact.abs() + 3 * 2**-8 * 0.1
    assert float(((fast - exact).abs() > near).double().mean()) < 0.01
    assert float((fast - exact).abs().mean()) < 0.02 * float((exact - origin).abs().mean())


@pytest.mark.parametrize(
    "method",
    [
        "dare_ties",
        "dare_linear",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("della", "della_linear")),
    ],
)
def test_random_methods_have_mergekit_s_distribution(spec, merger, method: str) -> None:
    """Means and spreads over seeds, of the differences from the base."""
    recipe = _recipe(spec, method, density=0.6, **({"epsilon": 0.2} if method.startswith("della") else {}))
    merger.merge(
        {
            **recipe,
            "merge_method": "task_arithmetic",
            "models": [{"model": spec.models[0], "parameters": {"weight": 0.0}}],
        },
        seed=0,
    )
    base = _state(merger)
    rows = {}
    for exact in (False, True):
        draws = []
        for seed in range(12):
            merger.merge(recipe, seed=seed, exact=exact)
            draws.append(_state(merger) - base)
        rows[exact] = torch.stack(draws)
    fast, theirs = rows[False], rows[True]
    assert float(fast.abs().mean()) == pytest.approx(float(theirs.abs().mean()), rel=0.02)
    assert float(fast.std(0).mean()) == pytest.approx(float(theirs.std(0).mean()), rel=0.05)
    # The mean over the seeds is that of mergekit, as far as a mean over twelve draws can tell.
    spread = float((fast.mean(0) - theirs.mean(0)).std())
    assert spread == pytest.approx(float(theirs.var(0).mean()) ** 0.5 * (2 / 12) ** 0.5, rel=0.25)
    assert not torch.equal(fast[0], fast[1])


def test_masks_follow_the_seed_and_the_density(spec, merger) -> None:
    def merged(seed: int, density: float) -> Any:
        merger.merge(_recipe(spec, "dare_linear", density=density), seed=seed)
        return _state(merger)

    first, other, again = merged(1, 0.5), merged(2**63 + 1, 0.5), merged(1, 0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, merged(1, 0.6))


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("dare_ties", {"density": -0.1}, "`density` must be at least 0"),
        ("della", {"density": 0.9, "epsilon": 0.2}, "`epsilon` must be such"),
    ],
)
def test_no_probability_is_a_failed_trial(spec, merger, method, parameters, message) -> None:
    with pytest.raises(StageError, match=message):
        merger.merge(_recipe(spec, method, **parameters), seed=0)
    merger.merge(_recipe(spec, "ties"), seed=0)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs_ties"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_weight_that_is_no_number_fails_as_in_mergekit(spec, merger, method: str, number: float) -> None:
    """In every mode, and not as a weight of 0."""
    recipe = _recipe(spec, method)
    recipe["models"][0]["parameters"]["weight"] = number
    for exact in (True, False):
        with pytest.raises(StageError, match="NaN or infinite after merging"):
            merger.merge(recipe, seed=0, exact=exact)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", None),
        ("dare_linear", None),
        ("breadcrumbs", None),
        ("della", {"density": 0.5, "epsilon": -0.1}),
    ],
)
def test_what_has_no_fast_form_is_mergekit_s(spec, merger, method: str, parameters: Any) -> None:
    """A base without other models (`parameters` is None), and an `epsilon` that is negative."""
    recipe = _recipe(spec, method, **(parameters or {}))
    if parameters is None:
        recipe["models"] = [{"model": spec.base_model}]
    merger.merge(recipe, seed=3, exact=True)
    exact = _state(merger)
    merger.merge(recipe, seed=3)
    assert torch.equal(exact, _state(merger))
