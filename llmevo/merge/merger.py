"""Merging in memory: the parents loaded once, one resident model that takes each recipe's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, final

from llmevo.errors import GenomeError, StageError
from llmevo.genome import MergeSpec, MergeStageSpec
from llmevo.merge import adapters, identity, layout, memory, plan, weights
from llmevo.merge.engines import engine_for
from llmevo.merge.fast import METHODS, FastMerge
from llmevo.merge.layout import Arena
from llmevo.merge.parents import check_parents, models_of
from llmevo.merge.references import Located, canonical, locate, plain_reference, substitute
from llmevo.merge.resolve import Resolved, Resolver

if TYPE_CHECKING:
    import torch
    from mergekit.common import ModelReference

# The vocabularies are checked to be the same where a tokenizer is asked for, so that there is nothing to
# permute.
_TOKENIZER_KEYS = ("tokenizer_source", "tokenizer", "chat_template")


@final
class Merger:
    """Merges recipes of one genome's models into one resident transformers model.

    In the exact mode the weights are those that mergekit's `run_merge` would write, bit for bit, before they
    are cast to the resident model's dtype: the parameters of each tensor come from mergekit's planner and the
    arithmetic is mergekit's, on the same inputs. Random masks (DARE, DELLA) are those of `run_merge` with the
    same seed on the same kind of device.

    In the fast mode, methods with a fast form (`fast.FastMerge`) are one pass over flat buffers, accumulated
    in float32 and rounded once, and only over tensors whose weights changed; others are merged exactly.

    Memory: every model of the genome once in `spec.dtype` (tensors in which models are equal are shared), the
    resident model in `dtype`, and one tensor's temporaries. `bytes_held` counts the first. Where all methods
    of the genome are sums of models, a LoRA is held as its two factors, in float32, and mergekit's arithmetic
    is served with matrices made from them one at a time.

    Args:
        spec: The merge half of the genome. It is checked with `check_parents` first.
        stage: How merges are computed.
        device: Where the weights live and merges are computed: `cpu`, `cuda`, `cuda:1`, ...
        dtype: Of the resident model, as a torch dtype or its name.

    Attributes:
        model: The resident model, in evaluation mode and without gradients. Before the first merge it has the
            weights of the base model, or of the first parent where there is none. Its parameters stay the
            same objects in the same memory, whatever is merged.
        tokenizer: That model's tokenizer; None where it has none.
        facts: What `check_parents` returned.
        memory: Where the weights lie and what they take, as `memory.plan` decided before loading; plain data.
        bytes_held: Bytes of the models' weights in memory, the resident model left out.

    Raises:
        GenomeError: If the parents cannot be merged, or a weight is not finite.
    """

    def __init__(
        self,
        spec: MergeSpec,
        stage: MergeStageSpec = MergeStageSpec(),  # noqa: B008 (frozen)
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "bfloat16",
    ) -> None:
        import torch

        self.facts = check_parents(spec)
        self._stage = stage
        self._device = torch.device(device)
        self._dtype = torch_dtype(spec.dtype)
        located = self._located = {where.name: where for where in map(locate, models_of(spec))}
        # Masks choose elements, which factors have not; mergekit's own arithmetic wants them too.
        summed = stage.mode == "fast" and all(method in METHODS for method in spec.methods)
        factors = adapters.kept(located, self._dtype) if summed else {}
        self.memory = memory.plan(
            located,
            dtype=self._dtype,
            resident_dtype=torch_dtype(dtype),
            device=self._device,
            memory=stage.memory,
            factors=factors,
            ranked=_ranked(spec, located) if stage.mode == "fast" else (),
        )
        first = located[canonical(models_of(spec)[0])]
        self.model = _resident(first, self._device, torch_dtype(dtype))
        self.tokenizer = tokenizer_of(first)
        self._arena = Arena()
        layout.place(self.model, self._arena)
        self._load(located, factors)
        self._arch = plan.architecture([plain_reference(where.folder) for where in located.values()])
        self._resolver = Resolver(lambda recipe: plan.trace(*self._plannable(recipe)), self._loaders)
        self._engine = engine_for(self._arena, self._device, streamed=self.memory["mode"] == "streamed")
        parameters = self.model.named_parameters(remove_duplicate=False)
        outputs = {name: self._arena.slot(p.data) for name, p in parameters}
        self._fast = FastMerge(self._arena, self._engine, self._resolver, outputs, self._dtype)
        self._check_coverage(first)

    def merge(self, recipe: dict[str, Any], seed: int, exact: bool = False) -> int:
        """Merge a recipe into the resident model.

        Args:
            recipe: A mergekit configuration as plain data, with the genome's own model names. Layers may be
                taken from any slices, as long as there are as many as the model has.
            seed: Decides every random mask: the same recipe and seed give the same weights. 0 to 2^64 - 1.
                torch's random state is left as it was.
            exact: Merge with mergekit's own arithmetic, whatever the stage's mode.

        Returns:
            Bytes written into the resident model; tensors that keep their weights are not written.

        Raises:
            StageError: If mergekit refuses the recipe, the recipe names a model that the genome lacks, or a
                merged tensor has a value that is not finite. The resident model then holds parts of two
                merges, which the next merge overwrites.
        """
        import torch

        with self._refusals(), torch.no_grad():
            resolved = None if exact else self._fast_form(recipe)
            if resolved is not None:
                return self._fast.merge(resolved, seed)
            self._fast.forget()
            whole = {name: weights.Whole(model, self._device) for name, model in self._loaders.items()}
            with self._random_state(seed), weights.loaders(whole):
                return self._write(plan.steps(*self._plannable(recipe)))

    def identity(self, recipe: dict[str, Any], seed: int, exact: bool = False) -> str:
        """Name the weights that `merge` with the same arguments would write.

        Two merges of one name give the same weights, in any process: the name follows from the contents of
        the models' files, the parameters of every tensor, the mode, the dtypes, the kind of device, the
        version of mergekit, and the seed where the method draws masks. Files are read when first asked.

        Returns:
            A hexadecimal number.

        Raises:
            StageError: If mergekit refuses the recipe, or it names a model that the genome lacks.
        """
        with self._refusals():
            resolved = self._resolver.resolve(recipe)
            form = None if exact else self._fast_form(recipe)
            if resolved is not None:
                name = identity.of_resolved(resolved, self._contents)
            else:
                kept = {key: value for key, value in recipe.items() if key not in _TOKENIZER_KEYS}
                hashes = {str(key): value for key, value in self._contents.items()}
                table = {name: hashes[str(ref)] for name, ref in self._references.items()}
                name = identity.of_plain(substitute(kept, table))
        facts = {
            "weights": name,
            "seed": seed if identity.draws(recipe.get("merge_method")) else None,
            "arithmetic": version("mergekit")
            if form is None
            else [identity.ARITHMETIC, self._engine.name, form.skeleton.factored],
            "dtypes": [recipe.get("dtype"), recipe.get("out_dtype"), str(self._dtype), str(self.model.dtype)],
            "device": self._device.type,
        }
        return identity.of_plain(facts)

    @cached_property
    def _contents(self) -> dict[ModelReference, str]:
        return {self._references[name]: identity.content(where) for name, where in self._located.items()}

    def _fast_form(self, recipe: dict[str, Any]) -> Resolved | None:
        return None if self._stage.mode == "exact" else self._fast.resolve(recipe)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Serve mergekit the models, and turn what it raises into a failure of the stage."""
        try:
            with weights.loaders(self._loaders):
                yield
        except StageError:
            raise
        except (
            Exception
        ) as error:  # mergekit raises RuntimeError, ValueError, TypeError, KeyError and pydantic's
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StageError("merge", f"{type(error).__name__}: {reason[:500]}") from error

    def _load(self, located: dict[str, Located], factors: Mapping[str, Mapping[str, float]]) -> None:
        import torch

        self._references: dict[str, ModelReference] = {}
        self._loaders: dict[ModelReference, weights.Weights] = {}
        self._lossless = True
        places = self.memory["models"]
        # Models without factors first: the others are built on them.
        every = memory.bases(located, factors)
        held: dict[ModelReference, weights.Weights] = {}
        host = torch.device("cpu")
        for name, where in every.items():
            reference = _reference(where)
            if name not in factors and reference not in held:
                held[reference], lossless = weights.load(
                    where,
                    dtype=self._dtype,
                    device=self._device if places[name]["where"] == str(self._device) else host,
                    arena=self._arena,
                    streamed=places[name]["where"] == "file",
                    pinned=places[name]["where"] == "host" and self._device.type == "cuda",
                    others=list(held.values()),
                )
                self._lossless = self._lossless and lossless
        on_disk = {_reference(every[name]) for name, place in places.items() if place["where"] == "file"}
        counted = [t for ref, model in held.items() if ref not in on_disk for t in model.tensors.values()]
        for name, where in located.items():
            reference = self._references[name] = _reference(where)
            if name in factors and reference not in held:
                loaded = adapters.load(where, factors[name], self._arena, self._device)
                held[reference] = weights.Weights(held[plain_reference(where.folder)].tensors, loaded)
                counted += [t for factor in loaded.values() for t in (factor.up, factor.down)]
            self._loaders[reference] = held[reference]
        self.bytes_held = layout.count_bytes(counted)

    def _plannable(self, recipe: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Return what mergekit's planner takes."""
        kept = {key: value for key, value in recipe.items() if key not in _TOKENIZER_KEYS}
        dtype = kept.get("dtype")
        if not self._lossless and (dtype is None or torch_dtype(dtype) != self._dtype):
            raise StageError(
                "merge",
                f"the recipe's `dtype` must be {str(self._dtype).removeprefix('torch.')}, in which the "
                f"genome has the "
                f"parents loaded, not {dtype!r}: change one of the two",
            )
        try:
            placed = substitute(kept, self._references)
        except KeyError as error:
            raise StageError(
                "merge",
                f"the recipe names the model `{error.args[0]}`, which is not in the genome: add it to "
                f"`genome.models`, or name one of {', '.join(self._references)}",
            ) from None
        return placed, self._arch, self.model.config

    def _write(self, steps: list[plan.Step]) -> int:
        import torch

        # Tied weights are one tensor under two names, and must be written once.
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        missing = {parameter.data_ptr(): name for name, parameter in parameters.items()}
        written = 0
        for step in steps:
            result = step.run()
            if result is None:
                continue
            if step.name not in parameters:
                raise StageError("merge", f"tensor `{step.name}` of the recipe has no place in the model")
            parameter = parameters[step.name]
            parameter.copy_(result)
            if not bool(torch.isfinite(parameter).all()):
                raise StageError(
                    "merge", f"tensor `{step.name}` has values that are NaN or infinite after merging"
                )
            if missing.pop(parameter.data_ptr(), None) is not None:
                written += parameter.numel() * parameter.element_size()
        if missing:
            raise StageError(
                "merge",
                f"the recipe gives no weights for {len(missing)} tensors of the model, such as "
                f"`{next(iter(missing.values()))}`: its slices must add up to the model's layers",
            )
        return written

    def _check_coverage(self, first: Located) -> None:
        """Merge the first model with itself alone: fails where mergekit's names are not transformers'."""
        recipe = {
            "merge_method": "passthrough",
            "models": [{"model": first.name}],
            "dtype": str(self._dtype).removeprefix("torch."),
        }
        try:
            self.merge(recipe, seed=0, exact=True)
        except StageError as error:
            raise GenomeError(
                f"`{first.name}`: {self.facts['architecture']} cannot be merged in memory: {error.reason}"
            ) from error

    @contextmanager
    def _random_state(self, seed: int) -> Iterator[None]:
        import torch

        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield


def _reference(where: Located) -> ModelReference:
    from mergekit.common import ModelPath, ModelReference

    lora = ModelPath(path=str(where.adapter)) if where.adapter is not None else None
    return ModelReference(model=ModelPath(path=str(where.folder)), lora=lora)


def _ranked(spec: MergeSpec, located: Mapping[str, Located]) -> list[str]:
    """Return the models whose differences DELLA ranks."""
    base = canonical(spec.base_model) if spec.base_model else None
    return [name for name in located if name != base] if {"della", "della_linear"} & {*spec.methods} else []


def _resident(where: Located, device: torch.device, dtype: torch.dtype) -> Any:
    from mergekit.common import get_auto_cls

    from llmevo.merge import headers

    loader = get_auto_cls(headers.config(where)["architectures"][0])
    model = loader.from_pretrained(
        str(where.folder), dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    return model.to(device).eval().requires_grad_(False)


def tokenizer_of(where: Located) -> Any:
    """A model's tokenizer; None where it has none."""
    from transformers import AutoTokenizer

    if not (where.folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(str(where.folder), trust_remote_code=False)


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """Torch's own type for one of the names that a genome has.

    Raises:
        GenomeError: It is none.
    """
    import torch

    if isinstance(name, torch.dtype):
        return name
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise GenomeError(f"`dtype` must be bfloat16, float16 or float32, not {name!r}")
    return dtype
