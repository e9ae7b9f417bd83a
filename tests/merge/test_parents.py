"""Parents that must not be merged are refused before anything is loaded, with the names and shapes."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmevo.errors import GenomeError
from llmevo.genome import MergeSpec
from llmevo.merge import Merger, check_parents, export
from llmevo.merge.references import canonical

pytest.importorskip("mergekit")


@pytest.fixture(scope="module")
def small(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("small") / "base", seed=0, layers=2)


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """A parent like `small`, for a test to spoil."""
    return Path(shutil.copytree(small, tmp_path / "parent"))


def _edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


def _spec(*models: Path | str, **more: Any) -> MergeSpec:
    return MergeSpec(models=[str(m) for m in models], **more)


def test_facts(tiny_llamas, loras) -> None:
    spec = _spec(*tiny_llamas.parents, f"{tiny_llamas.base}+{loras[0]}", base_model=str(tiny_llamas.base))
    facts = check_parents(spec)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert (facts["layers"], facts["tied"], facts["notes"]) == (4, True, [])
    assert len(facts["models"]) == 5
    size = (tiny_llamas.base / "model.safetensors").stat().st_size
    assert 0 < size - facts["bytes"] < 10_000  # the rest is the header
    assert facts["parameters"] * 2 == facts["bytes"]


def test_weights_are_never_read(copy: Path, small: Path) -> None:
    """Only the headers: a file that is cut off after its header passes here (and fails when weights load)."""
    file = copy / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as opened:
        opened.seek(header)
        opened.write(b"\xff" * 1000)  # NaN in bfloat16
    assert check_parents(_spec(small, copy))["notes"] == []


def test_another_shape(make_tiny_llama, small: Path, tmp_path: Path) -> None:
    wide = make_tiny_llama(tmp_path / "wide", seed=1, layers=2, hidden=96)
    message = r"`\S+` has shape \[(\d+, )?96\] in `\S+wide` and \[(\d+, )?64\] in `\S+base`"
    with pytest.raises(GenomeError, match=message):
        check_parents(_spec(small, wide))


def test_another_depth(make_tiny_llama, small: Path, tmp_path: Path) -> None:
    deep = make_tiny_llama(tmp_path / "deep", seed=1, layers=3)
    with pytest.raises(GenomeError, match=r"deep` has a tensor `model\.layers\.2.*which `\S+base` lacks"):
        check_parents(_spec(small, deep))
    with pytest.raises(GenomeError, match=r"base` has no tensor `model\.layers\.2"):
        check_parents(_spec(deep, small))


def test_a_head_of_its_own(make_tiny_llama, small: Path, tmp_path: Path) -> None:
    untied = make_tiny_llama(tmp_path / "untied", seed=1, layers=2, tied=False)
    with pytest.raises(GenomeError, match=r"base` ties its head to the embeddings and `\S+untied` does not"):
        check_parents(_spec(untied, small))


def test_a_stored_head_in_a_tied_model(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(GenomeError, match=r"stores a `lm_head\.weight` all the same"):
        check_parents(_spec(copy))


def test_another_architecture(copy: Path, small: Path) -> None:
    _edit(copy / "config.json", architectures=["MistralForCausalLM"])
    message = r"parent` is a MistralForCausalLM, but `\S+base` is a LlamaForCausalLM"
    with pytest.raises(GenomeError, match=message):
        check_parents(_spec(small, copy))


def test_another_vocabulary(copy: Path, small: Path) -> None:
    _edit(copy / "config.json", vocab_size=17)
    with pytest.raises(GenomeError, match=r"parent` has a vocabulary of 17 and `\S+base` one of \d+"):
        check_parents(_spec(small, copy))


def test_a_few_renamed_tokens_are_a_note_and_another_tokenizer_is_refused(copy: Path, small: Path) -> None:
    path = copy / "tokenizer.json"
    data = json.loads(path.read_text())
    names = {"<|im_start|>": "<|python_tag|>"}
    data["model"]["vocab"] = {names.get(t, t): i for t, i in data["model"]["vocab"].items()}
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    path.write_text(json.dumps(data))
    assert "1 token ids have another meaning" in check_parents(_spec(small, copy))["notes"][0]
    with pytest.raises(GenomeError, match="needs them identical"):
        check_parents(_spec(small, copy, tokenizer_source="base", base_model=str(small)))
    size = len(data["model"]["vocab"])
    data["model"]["vocab"] = {t: (i * 7 + 3) % size for t, i in data["model"]["vocab"].items()}
    path.write_text(json.dumps(data))
    with pytest.raises(GenomeError, match="have different tokenizers: id"):
        check_parents(_spec(small, copy))


def test_pickles_are_refused_and_never_opened(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    trap = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (trap,))

    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(GenomeError, match=r"parent`.*pickles only \(pytorch_model\.bin\)"):
        check_parents(_spec(copy))
    assert not trap.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(file: str, copy: Path) -> None:
    _edit(copy / file, auto_map={"AutoModelForCausalLM": "modeling.Own"})
    with pytest.raises(GenomeError, match=rf"parent`: `{file}` has `auto_map`"):
        check_parents(_spec(copy))


def test_quantised_weights_are_refused(copy: Path) -> None:
    _edit(copy / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(GenomeError, match="quantised weights cannot be merged"):
        check_parents(_spec(copy))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "must hold `config.json`"),
        (lambda p: (p / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda p: (p / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda p: (p / "model.safetensors").unlink(), "must hold `model.safetensors`"),
        (lambda p: (p / "model.safetensors").write_bytes(b"x" * 40), "is no safetensors file"),
        (
            lambda p: (p / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../x.safetensors"}}'
            ),
            r"shards of `model.safetensors.index.json` are missing: \['x.safetensors'\]",
        ),
    ],
)
def test_damaged_folders(spoil: Callable[[Path], Any], message: str, copy: Path) -> None:
    spoil(copy)
    with pytest.raises(GenomeError, match=message):
        check_parents(_spec(copy))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere/at/all", "there is no folder './nowhere/at/all'; check the path"),
        (
            "nobody-at-all/nothing-there",
            "'nobody-at-all/nothing-there' is no folder, .* `hf download nobody-at-all/nothing-there`",
        ),
        ("{file}", "must name folders with a model, but .* is a file; name its folder"),
    ],
)
def test_references_that_lead_nowhere(name: str, message: str, small: Path) -> None:
    with pytest.raises(GenomeError, match=message):
        check_parents(_spec(name.format(file=small / "config.json")))


@pytest.mark.parametrize("name", ["a+b+c", "a@b@c", 7, {"path": "a"}])
def test_names_that_mergekit_cannot_parse(name: Any) -> None:
    """They can come from a recipe that was put in by hand; the genome's own are checked when it is read."""
    with pytest.raises(GenomeError, match="is no model reference"):
        canonical(name)


def test_a_hub_name_is_found_in_the_local_cache(small: Path, tmp_path: Path, monkeypatch) -> None:
    """Merged and exported under its name, offline, although mergekit itself would ask the hub for files."""
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "cache" / "models--somebody--tiny-llama"
    shutil.copytree(small, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    spec = _spec("somebody/tiny-llama", small)
    assert check_parents(spec)["models"][0] == "somebody/tiny-llama"
    recipe = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in spec.models],
        "dtype": "bfloat16",
    }
    Merger(spec, device="cpu", dtype="bfloat16").merge(recipe, seed=0)
    out = export(recipe, tmp_path / "out")
    assert "- `somebody/tiny-llama`" in (out / "README.md").read_text()


def test_adapters_must_fit_their_base(make_tiny_llama, loras, small: Path, tmp_path: Path) -> None:
    wide = make_tiny_llama(tmp_path / "wide", seed=1, layers=4, hidden=96)
    with pytest.raises(GenomeError, match=r"needs shape \[\d+, \d+\] \(from A \[4, \d+\] and B"):
        check_parents(_spec(f"{wide}+{loras[0]}"))
    # `small` has two layers, the adapters' base has four.
    message = r"changes `model\.layers\.\d\.\S+`, which the base model does not have"
    with pytest.raises(GenomeError, match=message):
        check_parents(_spec(f"{small}+{loras[0]}"))


def test_adapters_that_are_no_lora(tiny_llamas, loras, tmp_path: Path) -> None:
    def spoilt(name: str, spoil: Callable[[Path], Any]) -> str:
        folder = Path(shutil.copytree(loras[0], tmp_path / name))
        spoil(folder)
        return f"{tiny_llamas.base}+{folder}"

    def to_pickle(folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")

    cases = {
        r"must be a PEFT LoRA, and `peft_type`.*'IA3'": lambda f: _edit(
            f / "adapter_config.json", peft_type="IA3"
        ),
        "makes peft import a module": lambda f: _edit(f / "adapter_config.json", megatron_config={"a": 1}),
        "pickles only": to_pickle,
    }
    for number, (message, spoil) in enumerate(cases.items()):
        with pytest.raises(GenomeError, match=message):
            check_parents(_spec(spoilt(str(number), spoil)))


@pytest.mark.filterwarnings("ignore:(Model has `tie_word|Setting `save_embedding_layers`):UserWarning")
def test_an_adapter_for_a_tied_head_is_named_as_that(tiny_llamas, make_lora, tmp_path: Path) -> None:
    adapter = make_lora(tmp_path / "head", tiny_llamas.base, seed=5, target_modules=["q_proj", "lm_head"])
    with pytest.raises(GenomeError, match=r"`lm_head\.weight`, which is the embedding matrix"):
        check_parents(MergeSpec(models=[f"{tiny_llamas.base}+{adapter}"]))


def test_two_names_of_one_parent_are_refused(tiny_llamas, loras) -> None:
    first, base = tiny_llamas.parents[0], tiny_llamas.base
    for names in ([f"{first}/", str(first)], [f"{base}+{loras[0]}", f"{base}/+{loras[0]}"]):
        with pytest.raises(GenomeError, match=r"`genome\.models` must name each model once"):
            check_parents(MergeSpec(models=names, base_model=str(base)))
    check_parents(MergeSpec(models=[f"{base}/", str(first)], base_model=str(base)))
