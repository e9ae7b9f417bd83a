"""One model that is trained and not merged: loaded as what it is trained as, and then left alone."""

from __future__ import annotations

import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

from llmevo.errors import GenomeError
from llmevo.genome import MergeSpec
from llmevo.merge import headers, identity, memory
from llmevo.merge.export import publish
from llmevo.merge.merger import tokenizer_of, torch_dtype
from llmevo.merge.parents import check_parents, models_of
from llmevo.merge.references import Located, locate

if TYPE_CHECKING:
    import torch

_COPIED = (".json", ".safetensors", ".model", ".txt", ".jinja")


@final
class Loaded:
    """A model with a head that a merge has no tensors for, or with an encoder and a decoder.

    It stands where `Merger` stands, and has the same attributes. Its one recipe is the model itself.

    Args:
        spec: The merge half of a genome that names one model.
        head: What the model is to say; see `TrainSpec`.
        seed: Of the weights that a head starts with.
        device: Where the weights live.
        dtype: Of the resident model, as a torch dtype or its name.

    Raises:
        GenomeError: The model cannot be loaded as that.
    """

    def __init__(
        self,
        spec: MergeSpec,
        head: Literal["lm", "classification", "regression"],
        *,
        seed: int,
        device: str | torch.device,
        dtype: str | torch.dtype,
    ) -> None:
        import torch

        self.facts = check_parents(spec)
        self._where = locate(models_of(spec)[0])
        self._settings = [head, seed, str(dtype)]
        self._device = torch.device(device)
        if self._where.adapter is not None:
            raise GenomeError(
                f"`genome.models` must not have an adapter in {self._where.name!r} where a head or an "
                "encoder-decoder is trained; add it to the weights first, or name the model alone."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = _load(self._where, head, torch_dtype(dtype))
        self.model.to(self._device).eval().requires_grad_(False)
        self.tokenizer = tokenizer_of(self._where)
        held = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.bytes_held = 0
        self.memory = {
            "mode": "resident",
            "device": str(self._device),
            "models": {},
            "merged": held,
            "staging": 0,
            "ranks": 0,
            "needed": held,
            "available": memory.available(self._device),
        }

    def merge(self, recipe: dict[str, Any], seed: int, exact: bool = False) -> int:
        """Do nothing, since the model is what every recipe of the genome says; return 0 bytes."""
        return 0

    def identity(self, recipe: dict[str, Any], seed: int, exact: bool = False) -> str:
        """Name the weights, as `Merger.identity` does."""
        return identity.of_plain([self._content, *self._settings, self._device.type])

    @cached_property
    def _content(self) -> str:
        return identity.content(self._where)


def needed(spec: MergeSpec, head: str) -> bool:
    """Whether a genome's one model is for `Loaded` and not for `Merger`.

    Raises:
        GenomeError: It has no configuration.
    """
    config = headers.config(locate(models_of(spec)[0]))
    return head != "lm" or bool(config.get("is_encoder_decoder"))


def skeleton(spec: MergeSpec, head: str) -> tuple[Any, Any]:
    """A model without weights, all tensors on torch's `meta` device, as a training would meet it.

    Args:
        spec: The merge half of a genome; merges have the architecture of its first model.
        head: What the model is to say; see `TrainSpec`.

    Returns:
        The model, and its tokenizer.

    Raises:
        GenomeError: Its configuration or tokenizer is missing, or no class of transformers is made from it.
    """
    import torch
    import transformers

    where = locate(models_of(spec)[0])
    pairs = bool(headers.config(where).get("is_encoder_decoder"))
    kind = "AutoModelForCausalLM" if head == "lm" and not pairs else _class(head)
    try:
        config = transformers.AutoConfig.from_pretrained(str(where.folder), trust_remote_code=False)
        with torch.device("meta"):
            model = getattr(transformers, kind).from_config(config)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unloadable(where, kind, error) from None
    tokenizer = tokenizer_of(where)
    if tokenizer is None:
        raise GenomeError(
            f"`genome.models` must have a tokenizer beside the weights, but {where.name!r} has none."
        )
    return model, tokenizer


def copy_of(spec: MergeSpec, out: Path, card: str) -> Path:
    """Write the genome's one model as it is, with a card; `export` for what mergekit has no table for.

    Raises:
        GenomeError: `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GenomeError(f"`out` must be a new or an empty folder, and {out} is not: choose another")
    folder = locate(models_of(spec)[0]).folder
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for file in folder.iterdir():
            if file.is_file() and file.suffix in _COPIED:
                shutil.copyfile(file, beside / file.name)
        (beside / "README.md").write_text(card, encoding="utf-8")
        publish(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out


def _load(where: Located, head: str, dtype: torch.dtype) -> Any:
    import transformers
    from transformers.utils import logging

    kind = _class(head)
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # that a head is new is known
    try:
        return getattr(transformers, kind).from_pretrained(
            str(where.folder), dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _unloadable(where, kind, error) from None
    finally:
        logging.set_verbosity(before)


def _class(head: str) -> str:
    """The class of transformers that makes a model for `Loaded`."""
    return "AutoModelForSeq2SeqLM" if head == "lm" else "AutoModelForSequenceClassification"


def _unloadable(where: Located, kind: str, error: Exception) -> GenomeError:
    reason = " ".join(str(error).split())[:300]
    return GenomeError(
        f"`genome.models` must name a model that transformers' {kind} loads, but {where.name!r} is not one "
        f"({reason}); name another, or change `train.head`."
    )
