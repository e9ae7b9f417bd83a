"""From a model's name in the genome to a folder: mergekit's syntax `path[@revision][+adapter]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from llmevo import hub
from llmevo.errors import GenomeError

if TYPE_CHECKING:
    from mergekit.common import ModelReference

# What is fetched from the hub: never pickles, never code.
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


@final
@dataclass(frozen=True, slots=True)
class Located:
    """A model of the genome, found.

    Args:
        name: The reference as mergekit prints it, e.g. `models/base+adapters/german`.
        folder: Holds `config.json` and the safetensors of the full model.
        adapter: Holds `adapter_config.json` and `adapter_model.safetensors`; None without an adapter.
    """

    name: str
    folder: Path
    adapter: Path | None


def canonical(reference: Any) -> str:
    """Return the one spelling of a model reference, as mergekit prints it.

    Args:
        reference: A string, or the mapping that mergekit writes for names with spaces.

    Raises:
        GenomeError: If mergekit cannot parse it.
    """
    from mergekit.common import ModelReference

    try:
        return str(ModelReference.model_validate(reference))
    except (RuntimeError, ValueError) as error:
        raise GenomeError(
            f"`{reference}` is no model reference: {_first_line(error)}. Write `path`, `path@revision`, "
            "`path+adapter` or `path@revision+adapter`, with no other `@` or `+` in it"
        ) from error


def locate(reference: Any) -> Located:
    """Find the folders of a model and its adapter, on this disk or on the Hugging Face hub.

    A folder wins over a hub repository of the same name. Hub files come from the local cache where they are
    there, and are downloaded otherwise, unless `HF_HUB_OFFLINE=1`.

    Raises:
        GenomeError: If the reference cannot be parsed, or leads nowhere.
    """
    from mergekit.common import ModelReference

    name = canonical(reference)
    parsed = ModelReference.model_validate(reference)
    folder = _folder(parsed.model.path, parsed.model.revision, name)
    adapter = _folder(parsed.lora.path, parsed.lora.revision, name) if parsed.lora else None
    return Located(name, folder, adapter)


def plain_reference(folder: Path) -> ModelReference:
    """Return mergekit's reference to a folder, also where its path holds `@` or `+`."""
    from mergekit.common import ModelPath, ModelReference

    return ModelReference(model=ModelPath(path=str(folder)))


def substitute(recipe: Any, table: Mapping[str, Any]) -> Any:
    """Return a copy of a recipe in which the models are replaced.

    Args:
        recipe: A mergekit configuration as plain data, or a part of one.
        table: From the canonical name to what replaces it.

    Raises:
        KeyError: If the recipe names a model that `table` does not hold; the argument is its name.
        GenomeError: If a name cannot be parsed.
    """
    if isinstance(recipe, Mapping):
        return {
            key: table[canonical(value)]
            if key in ("model", "base_model") and value is not None
            else substitute(value, table)
            for key, value in recipe.items()
        }
    if isinstance(recipe, list | tuple):
        return [substitute(part, table) for part in recipe]
    return recipe


def names(recipe: Any) -> list[str]:
    """Return the canonical names of a recipe's models, in order of appearance, each once."""
    found: dict[str, None] = {}

    def walk(part: Any) -> None:
        if isinstance(part, Mapping):
            for key, value in part.items():
                if key in ("model", "base_model") and value is not None:
                    found.setdefault(canonical(value))
                else:
                    walk(value)
        elif isinstance(part, list | tuple):
            for value in part:
                walk(value)

    walk(recipe)
    return list(found)


def _folder(path: str, revision: str | None, name: str) -> Path:
    if Path(path).exists():
        if not Path(path).is_dir():
            raise GenomeError(
                f"`genome.models` must name folders with a model, but {path!r} (of {name!r}) is a file; name "
                "its folder."
            )
        return Path(path).absolute()
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=_FILES))
    except Exception as error:  # the hub's client raises a dozen kinds, from OSError to httpx's
        raise hub.missing(path, error) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
