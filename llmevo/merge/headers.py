"""What a folder with a model says about itself, read without loading any weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from llmevo.errors import GenomeError
from llmevo.merge.references import Located

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@final
@dataclass(frozen=True, slots=True)
class Tensor:
    """The header of one tensor.

    Args:
        shape: Its sizes.
        dtype: As safetensors names it: `BF16`, `F16`, `F32`, ...
    """

    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON file that belongs to the model `name`.

    Raises:
        GenomeError: If it is missing or holds no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GenomeError(f"`{name}`: `{path.parent}` must hold `{path.name}`, and does not") from None
    except (OSError, ValueError) as error:
        raise GenomeError(f"`{name}`: `{path}` cannot be read as JSON ({error}): fetch it again") from error
    if not isinstance(data, dict):
        raise GenomeError(f"`{name}`: `{path}` must hold a JSON object, not a {type(data).__name__}")
    return data


def config(located: Located) -> dict[str, Any]:
    """Read `config.json`; refuse what would run code or cannot be merged.

    Raises:
        GenomeError: If the model brings code of its own, is quantised, or does not name one architecture.
    """
    data = read_json(located.folder / "config.json", located.name)
    for file in ("config.json", "tokenizer_config.json"):
        path = located.folder / file
        if path.is_file() and "auto_map" in read_json(path, located.name):
            raise GenomeError(
                f"`{located.name}`: `{file}` has `auto_map`, which makes transformers run Python code "
                f"from the model's "
                "folder. llmevo runs no such code: take a model of an architecture that transformers knows"
            )
    if "quantization_config" in data:
        raise GenomeError(
            f"`{located.name}` is quantised (`quantization_config` in config.json), and quantised "
            f"weights cannot be "
            "merged: take the model in bfloat16, float16 or float32"
        )
    if len(data.get("architectures") or ()) != 1:
        raise GenomeError(
            f"`{located.name}`: `architectures` in config.json must name one class, not "
            f"{data.get('architectures')!r}: save the model with transformers' `save_pretrained`"
        )
    return data


def weight_files(folder: Path, stem: str, name: str) -> list[Path]:
    """Return the safetensors of a model (`stem` is `model`) or an adapter (`adapter_model`).

    Raises:
        GenomeError: If there are none, also where there are pickles, or a shard of the index is missing.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index, name).get("weight_map", {}).values()))
        files = [folder / shard for shard in shards]
        # A shard's name is data from a file: it must not lead out of the model's folder.
        bad = [f.name for s, f in zip(shards, files, strict=True) if Path(s).name != s or not f.is_file()]
        if bad or not files:
            raise GenomeError(f"`{name}`: shards of `{index.name}` are missing: {bad}: fetch the model again")
        return files
    if single.is_file():
        return [single]
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES)
    if pickles:
        raise GenomeError(
            f"`{name}`: `{folder}` has its weights as pickles only ({', '.join(pickles[:3])}), which can "
            f"run code "
            "when they are loaded. llmevo loads safetensors only: convert them with transformers' "
            "`save_pretrained` where you trust them"
        )
    raise GenomeError(f"`{name}`: `{folder}` must hold `{single.name}` or `{index.name}`, and does not")


def tensors(folder: Path, stem: str, name: str) -> dict[str, Tensor]:
    """Read the headers of all tensors; costs milliseconds whatever the model's size.

    Raises:
        GenomeError: If a file is missing, or no safetensors.
    """
    return {
        key: Tensor(tuple(shape), dtype)
        for file in weight_files(folder, stem, name)
        for key, shape, dtype in _header(file, name)
    }


def stored_in(located: Located, dtype: Any) -> bool:
    """Whether all tensors of a model's own files are in a torch dtype."""
    return dtypes(located) == {str(dtype).removeprefix("torch.")}


def dtypes(located: Located) -> set[str | None]:
    """In what a model's own files hold its tensors: torch's names; None for what no model computes in."""
    return {_DTYPES.get(t.dtype) for t in tensors(located.folder, "model", located.name).values()}


def vocabulary(folder: Path) -> dict[int, str]:
    """Return the tokens by id, from `tokenizer.json`; empty where that file is missing or of another form."""
    try:
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = data["model"]["vocab"]
        by_id = (
            {int(number): token for token, number in vocab.items()}
            if isinstance(vocab, dict)
            else {number: entry[0] for number, entry in enumerate(vocab)}  # Unigram: pairs of token and score
        )
        by_id.update((int(t["id"]), t["content"]) for t in data.get("added_tokens", ()))
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return by_id


def _header(file: Path, name: str) -> Iterator[tuple[str, list[int], str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                part = opened.get_slice(key)
                yield key, part.get_shape(), part.get_dtype()
    except (SafetensorError, OSError) as error:
        raise GenomeError(f"`{name}`: `{file}` is no safetensors file ({error}): fetch it again") from error
