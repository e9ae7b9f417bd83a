"""Sums of adapters: what merging the models gives, at any rank, scale and choice of modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from llmevo.cli import main  # noqa: E402
from llmevo.errors import GenomeError  # noqa: E402
from llmevo.train import combine, products  # noqa: E402
from llmevo.train.products import Product  # noqa: E402

PROBE = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def drawn(rows: int, columns: int, rank: int, seed: int) -> Product:
    generator = torch.Generator().manual_seed(seed)
    up, down = (
        torch.randn(*shape, generator=generator).double() for shape in ((rows, rank), (rank, columns))
    )
    return Product(up, down)


def dense(product: Product) -> Any:
    return product.up @ product.down


small = st.integers(1, 7)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(small, min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 20),
    st.floats(-2, 2),
)
def test_sum_and_cut_are_those_of_the_dense_matrices(
    ranks: list[int], rows: int, columns: int, rank: int, weight: float
) -> None:
    terms = [(weight + place, drawn(rows, columns, r, place)) for place, r in enumerate(ranks)]
    whole = products.weighted_sum(terms)
    expected = sum(w * dense(product) for w, product in terms)
    torch.testing.assert_close(dense(whole), expected, atol=1e-12, rtol=0)
    cut, lost = products.truncated(whole, rank)
    u, values, v = torch.linalg.svd(expected, full_matrices=False)
    nearest = u[:, :rank] * values[:rank] @ v[:rank]
    torch.testing.assert_close(dense(cut), nearest, atol=1e-9, rtol=0)
    assert cut.rank <= min(rank, rows, columns)
    norm = float(expected.norm())
    assert lost * norm == pytest.approx(float((expected - dense(cut)).norm()), abs=1e-9)
    torch.testing.assert_close(cut.down @ cut.down.T, torch.eye(cut.rank).double(), atol=1e-9, rtol=0)
    if rank >= whole.rank:
        torch.testing.assert_close(dense(cut), expected, atol=1e-9, rtol=0)


def test_a_sketch_sees_the_change_and_not_its_factors() -> None:
    adapters = [{f"layer.{m}": drawn(40, 30, 4, 100 * n + m) for m in range(12)} for n in range(2)]
    first, second = (products.sketch(adapter, seed=3) for adapter in adapters)
    mixed = {}
    for name, product in adapters[0].items():
        g = drawn(4, 4, 4, 7)
        mixed[name] = Product(product.up @ dense(g), torch.linalg.inv(dense(g)) @ product.down)
    assert not torch.allclose(mixed["layer.0"].down, adapters[0]["layer.0"].down)
    torch.testing.assert_close(products.sketch(mixed, seed=3), first, atol=1e-6, rtol=0)
    # It is linear, and its length is that of the change.
    both = {
        name: products.weighted_sum([(0.3, p), (-2.0, adapters[1][name])]) for name, p in adapters[0].items()
    }
    torch.testing.assert_close(products.sketch(both, 3), 0.3 * first - 2.0 * second, atol=1e-6, rtol=0)
    true = sum(float(dense(product).square().sum()) for product in both.values())
    seen = [float(products.sketch(both, seed).square().sum()) for seed in range(40)]
    assert sum(seen) / 40 == pytest.approx(true, rel=0.1)
    # A module's place counts, and so does the seed.
    swapped = dict(zip(adapters[0], reversed(adapters[0].values()), strict=True))
    assert not torch.allclose(products.sketch(swapped, 3), first, rtol=0.1)
    assert not torch.allclose(products.sketch(adapters[0], 4), first, rtol=0.1)


@pytest.fixture
def adapter(tiny_folder: Path, load_model: Callable[[Path], Any], tmp_path: Path) -> Callable[..., Path]:
    """Save a LoRA with random factors on the tiny model."""

    def make(seed: int, **config: Any) -> Path:
        folder = tmp_path / f"adapter{seed}"
        given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = peft.get_peft_model(load_model(tiny_folder), peft.LoraConfig(**given))
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        return folder

    return make


def merged_models(
    tiny_folder: Path, load_model: Callable[[Path], Any], folders: list[Path], weights: list[float]
) -> Any:
    """The base plus weighted differences of the merged models: with weights of sum 1, their linear merge."""
    base = load_model(tiny_folder)
    result = {name: tensor.double() for name, tensor in base.state_dict().items()}
    for folder, weight in zip(folders, weights, strict=True):
        model = peft.PeftModel.from_pretrained(load_model(tiny_folder), folder).merge_and_unload()
        for name, tensor in model.state_dict().items():
            result[name] += weight * (tensor.double() - base.state_dict()[name].double())
    base.load_state_dict({name: tensor.float() for name, tensor in result.items()})
    return base


MIXED: list[dict[str, Any]] = [
    {},
    {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    {
        "r": 3,
        "rank_pattern": {"layers.1.self_attn.q_proj": 6, "v_proj": 2},
        "alpha_pattern": {"layers.2.self_attn.q_proj": 1.5, "v_proj": 7},
        "layers_to_transform": [1, 2],
    },
]


@pytest.mark.parametrize(
    ("configs", "weights"),
    [
        ([{}, {}], [0.5, 0.5]),
        (MIXED, [0.6, 0.9, -0.5]),
        ([{"use_rslora": True, "rank_pattern": {"q_proj": 6}}], [0.7]),
    ],
)
def test_merging_adapters_is_merging_the_models_and_peft_linear_is_not(
    configs: list[dict[str, Any]],
    weights: list[float],
    adapter: Callable[..., Path],
    tiny_folder: Path,
    load_model: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    folders = [adapter(seed, **config) for seed, config in enumerate(configs)]
    found = combine.combine(folders, weights, tmp_path / "sum")
    assert set(found.lost.values()) == {0.0}
    expected = merged_models(tiny_folder, load_model, folders, weights)(PROBE).logits
    plain = peft.PeftModel.from_pretrained(load_model(tiny_folder), tmp_path / "sum").eval()
    torch.testing.assert_close(plain(PROBE).logits, expected, atol=1e-5, rtol=0)
    base = load_model(tiny_folder)(PROBE).logits
    assert (expected - base).abs().max() > 0.05
    # Cut to a rank that is no less than its own, it is still the sum; to a smaller one, what it says is lost.
    assert combine.combine(folders, weights, tmp_path / "all", rank=64).ranks == found.ranks
    less = combine.combine(folders, weights, tmp_path / "less", rank=3)
    assert max(less.ranks.values()) <= 3
    assert max(less.lost.values()) > 0.01
    whole, part = (combine.read(tmp_path / name)[0] for name in ("sum", "less"))
    for name, lost in less.lost.items():
        gap = (dense(part[name]) - dense(whole[name])).norm() / dense(whole[name]).norm()
        assert float(gap) == pytest.approx(lost, abs=1e-5)
    if len(configs) != 2:
        return
    model = peft.PeftModel.from_pretrained(load_model(tiny_folder), folders[0], adapter_name="cand0")
    model.load_adapter(folders[1], "cand1")
    model.add_weighted_adapter(["cand0", "cand1"], weights, "linear", combination_type="linear")
    model.set_adapter("linear")
    wrong = (model.eval()(PROBE).logits - expected).abs().max()
    assert wrong > 0.5 * (expected - base).abs().max()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "biases"),
        ({"modules_to_save": ["norm"]}, "whole modules"),
        ({"peft_type": "IA3"}, "is IA3"),
        ({"peft_type": "None"}, "cannot be read"),
    ],
)
def test_what_is_no_product_is_refused(
    changed: dict[str, Any], message: str, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = adapter(0)
    config = json.loads((folder / "adapter_config.json").read_text())
    known = {} if "peft_type" in changed else config
    (folder / "adapter_config.json").write_text(json.dumps({**known, **changed}))
    with pytest.raises(GenomeError, match=message):
        combine.combine([folder], [1.0], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


def test_the_command_writes_an_adapter_and_says_what_was_cut_off(
    adapter: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(adapter(seed)) for seed in range(2)]

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["merge-adapters", *folders, *arguments])
        return int(left.value.code or 0), *capsys.readouterr()

    out = tmp_path / "sum"
    code, said, _ = command("--weight", "0.5", "--weight", "-1", "--out", str(out), "--rank", "4", "--json")
    assert code == 0
    facts = json.loads(said)
    assert facts["rank"] == 4
    assert 0.1 < facts["lost"] < 1
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    code, _, said = command("--weight", "0.5", "--out", str(tmp_path / "other"))
    assert (code, said) == (
        2,
        "error: `weights` must be one for each adapter, but there are 2 adapters and 1 weights.\n",
    )
    code, _, said = command("--weight", "1", "--weight", "1", "--out", str(out))
    assert code == 2
    assert "not there yet" in said
    code, said, _ = command("--weight", "1", "--weight", "1", "--out", str(tmp_path / "exact"))
    assert (code, said.splitlines()[0]) == (0, str(tmp_path / "exact"))
