"""The parents' weights, loaded once and kept in the form that mergekit's planner reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, final

from llmevo.errors import GenomeError
from llmevo.merge import headers
from llmevo.merge.layout import Arena
from llmevo.merge.references import Located

if TYPE_CHECKING:
    import torch

    from llmevo.merge.adapters import Factor


@final
class Weights:
    """One model's tensors in memory, behind the interface of mergekit's `LazyTensorLoader`.

    Args:
        tensors: By their names in the checkpoint; never changed.
        factors: What an adapter adds to some of them.
    """

    def __init__(
        self, tensors: dict[str, torch.Tensor], factors: Mapping[str, Factor] = MappingProxyType({})
    ) -> None:
        self.tensors = tensors
        self.factors = factors
        self.index = SimpleNamespace(tensor_paths=tensors)

    def get_tensor(self, key: str, device: str = "cpu") -> torch.Tensor:
        """Return a tensor where it lies, without its factors: mergekit asks for the CPU all the same."""
        return self.tensors[key]

    def flush(self) -> None:
        """Do nothing: there is no open shard."""


@final
class Whole:
    """The same model as mergekit would read it: adapters applied, on the device; a tensor at a time.

    Args:
        weights: The model.
        device: Where mergekit computes.
    """

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self._weights = weights
        self._device = device
        self.index = weights.index

    def get_tensor(self, key: str, device: str = "cpu") -> torch.Tensor:
        """Return a tensor; one that an adapter changes is made anew each time."""
        tensor, factor = self._weights.tensors[key], self._weights.factors.get(key)
        return (tensor if factor is None else factor.applied(tensor)).to(self._device)

    def flush(self) -> None:
        """Do nothing: there is no open shard."""


def load(
    located: Located,
    *,
    dtype: torch.dtype,
    device: torch.device,
    arena: Arena,
    streamed: bool = False,
    pinned: bool = False,
    others: Sequence[Weights] = (),
) -> tuple[Weights, bool]:
    """Load one model, apply its adapter, cast it, and check that it is finite.

    Args:
        located: What to load.
        dtype: Of floating-point tensors in memory.
        device: Where they stay.
        arena: Holds them.
        streamed: Leave tensors in the mapped file, from where they are read for each merge. What others write
            to the file is then seen.
        pinned: Hold them in pinned memory, from which a GPU copies.
        others: Models that are loaded already: a tensor that equals one of theirs is shared, not held again,
            such as those that an adapter leaves alone.

    Returns:
        The weights, and whether nothing was lost: every tensor was stored in `dtype` already.

    Raises:
        GenomeError: If a weight is NaN or infinite, or the adapter cannot be applied.
    """
    plain = located.adapter is None
    read = stored(located.folder, "model", located.name) if plain else _adapted(located)
    lossless, tensors = True, {}
    own: dict[str, torch.Tensor] = {}
    for key, tensor in read:
        if tensor.is_floating_point():
            lossless = lossless and tensor.dtype == dtype
            tensor = tensor.to(device=device, dtype=dtype)
            check_finite(tensor, key, located.name)
        shared = _same(key, tensor, others)
        tensors[key] = tensor.to(device) if shared is None else shared
        if shared is None and tensor.is_floating_point() and not streamed:
            own[key] = tensors[key]
    # Copied, since safetensors hands out views of the mapped file, which somebody may write to while the run
    # goes on.
    shapes = {key: tuple(t.shape) for key, t in own.items()}
    places = arena.allocate(shapes, dtype, device, pinned=pinned)
    for key, place in places.items():
        tensors[key] = place.copy_(own.pop(key))
    return Weights(tensors), lossless


def _same(key: str, tensor: torch.Tensor, others: Sequence[Weights]) -> torch.Tensor | None:
    import torch

    for other in others:
        theirs = other.tensors.get(key)
        if theirs is not None and theirs.dtype == tensor.dtype and torch.equal(tensor, theirs):
            return theirs
    return None


@contextmanager
def loaders(table: Mapping[Any, Weights | Whole]) -> Iterator[None]:
    """Make mergekit read these models from memory, and leave its own cache as it was.

    mergekit keeps its loaders in a dict on the class, shared by the whole process. A model left in it would
    be read from memory, or from a file that has gone, by the next merge in this process.

    Args:
        table: mergekit's model references and their weights; empty to begin with an empty cache.
    """
    from mergekit.io.tasks import LoaderCache

    before = LoaderCache.loaders
    LoaderCache.loaders = dict(table)
    try:
        yield
    finally:
        LoaderCache.loaders = before


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep warnings from the user: one is meant for peft (0.21 reads what transformers 5.23 deprecates)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # It is said as an error; peft then changes the configuration.
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied", UserWarning)
        yield


def stored(folder: Path, stem: str, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the tensors of a model (`stem` is `model`) or an adapter (`adapter_model`) as they are stored."""
    from safetensors import safe_open

    for file in headers.weight_files(folder, stem, name):
        with safe_open(file, framework="pt", device="cpu") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                yield key, opened.get_tensor(key)


def _adapted(located: Located) -> Iterator[tuple[str, torch.Tensor]]:
    """Apply a LoRA as mergekit does (`merge_and_unload` in the base's dtype), but not over the disk."""
    import torch
    from mergekit.common import get_auto_cls
    from peft import PeftModel

    architecture = headers.config(located)["architectures"][0]
    # peft draws random factors before it loads the trained ones: the caller's random state must not move.
    with quiet_peft(), torch.random.fork_rng(devices=[]), torch.no_grad():
        base = get_auto_cls(architecture).from_pretrained(
            str(located.folder), dtype="auto", use_safetensors=True, trust_remote_code=False
        )
        try:
            peft = PeftModel.from_pretrained(base, str(located.adapter), is_trainable=False)
            tied = bool(base.config.tie_word_embeddings)
            whole = peft.merge_and_unload()
            merged = whole.state_dict()
        except (RuntimeError, ValueError, TypeError, KeyError, ImportError) as error:
            raise GenomeError(
                f"`{located.name}`: peft cannot apply the adapter ({str(error).splitlines()[0]}): "
                "check that it was trained on this base model and with an installed version of peft"
            ) from error
    if tied:
        _check_tied(whole, located.name)
    for key in headers.tensors(located.folder, "model", located.name):
        if key not in merged:
            raise GenomeError(
                f"`{located.name}`: tensor `{key}` of the base model has another name in transformers, "
                f"so that the "
                "adapter cannot be applied in memory: merge it with peft, save it, and name the saved folder"
            )
        yield key, merged[key].detach()


def _check_tied(model: Any, name: str) -> None:
    """Refuse tied embeddings with an adapter that saved one of them: both would be evaluated as one."""
    import torch

    ends = [layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer]
    if len(ends) == 2 and not torch.equal(*ends):
        raise GenomeError(
            f"`{name}`: the base model's head is its embedding matrix (`tie_word_embeddings`), but the "
            "adapter has saved one of the two by itself (`modules_to_save`), so that they are two matrices: "
            "merge it with peft, save it and the other models with `tie_word_embeddings` false, and name the "
            "saved folders"
        )


def check_finite(tensor: torch.Tensor, key: str, name: str) -> None:
    """Refuse a tensor of the model `name` that has values that are NaN or infinite.

    Raises:
        GenomeError: It names the model and the tensor.
    """
    import torch

    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = int(finite.numel() - finite.sum())
        raise GenomeError(
            f"`{name}`: tensor `{key}` has {bad} of {finite.numel()} values that are NaN or infinite in "
            f"{tensor.dtype}: the file is damaged, or its training diverged; take another parent"
        )
