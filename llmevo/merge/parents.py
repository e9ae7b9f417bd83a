"""Checks of the parents before anything is spent: from configurations and headers, never weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from llmevo.errors import GenomeError
from llmevo.genome import MergeSpec
from llmevo.merge import headers
from llmevo.merge.headers import Tensor
from llmevo.merge.references import Located, canonical, locate

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_HEAD = "lm_head.weight"
# Fine-tunes rename a few reserved tokens and may still be merged; another tokenizer differs in most of them.
_RENAMED = 0.01


@final
@dataclass(frozen=True, slots=True)
class _Parent:
    located: Located
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def name(self) -> str:
        return self.located.name

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding matrix; a model without a flag says it by what it stores."""
        return bool(self.config.get("tie_word_embeddings", _HEAD not in self.tensors))


def models_of(spec: MergeSpec) -> list[str]:
    """Return the base model, if there is one, and the parents; each once."""
    return list(dict.fromkeys([*([spec.base_model] if spec.base_model else []), *spec.models]))


def check_parents(spec: MergeSpec) -> dict[str, Any]:
    """Check that the parents can be merged, from `config.json` and the safetensors headers alone.

    They must have one architecture, tensors of the same names and shapes, one vocabulary, and tie the
    embeddings alike; weights must be safetensors; no model may bring code of its own; adapters must be PEFT
    LoRAs that fit their base. Whether the weights are finite is checked when `Merger` loads them.

    Args:
        spec: The merge half of the genome.

    Returns:
        Facts for the run's record: `architecture`, `layers`, `vocabulary`, `tied`, `parameters` (of one
        model), `bytes` (of one model in `spec.dtype`), `models` (names), `notes` (what a person should know).

    Raises:
        GenomeError: If a parent breaks a rule; it names the parent, the tensor and both shapes.
    """
    parents = [_read(name) for name in models_of(spec)]
    _check_distinct([parent.located for parent in parents if parent.name in map(canonical, spec.models)])
    first = parents[0]
    for other in parents[1:]:
        _check_alike(first, other)
    notes = _check_vocabularies(parents, strict=spec.tokenizer_source is not None)
    parameters = sum(math.prod(t.shape) for t in first.tensors.values())
    return {
        "architecture": first.config["architectures"][0],
        "layers": first.config.get("num_hidden_layers"),
        "vocabulary": first.config.get("vocab_size"),
        "tied": first.tied,
        "parameters": parameters,
        "bytes": parameters * (4 if spec.dtype == "float32" else 2),
        "models": [p.name for p in parents],
        "notes": notes,
    }


def _check_distinct(located: Sequence[Located]) -> None:
    """Refuse two names of one model (`a` and `a/`), which mergekit refuses in every recipe."""
    seen: dict[tuple[object, object], str] = {}
    for where in located:
        other = seen.setdefault((where.folder, where.adapter), where.name)
        if other != where.name:
            raise GenomeError(
                f"`genome.models` must name each model once, but `{other}` and `{where.name}` are both "
                f"{where.adapter or where.folder}: remove one"
            )


def _read(name: str) -> _Parent:
    located = locate(name)
    parent = _Parent(located, headers.config(located), headers.tensors(located.folder, "model", located.name))
    for key, tensor in parent.tensors.items():
        if tensor.dtype not in _BYTES and len(tensor.shape) > 1:
            raise GenomeError(
                f"`{parent.name}`: tensor `{key}` is stored as {tensor.dtype}; merging needs "
                f"floating-point weights "
                "(bfloat16, float16 or float32)"
            )
    if parent.config.get("tie_word_embeddings") and _HEAD in parent.tensors:
        raise GenomeError(
            f"`{parent.name}` says `tie_word_embeddings` and stores a `{_HEAD}` all the same, so that "
            f"mergekit would "
            "merge the head and the embeddings apart: load and save it once with transformers' "
            "`save_pretrained`"
        )
    if located.adapter is not None:
        _check_adapter(parent)
    return parent


def _check_alike(first: _Parent, other: _Parent) -> None:
    a, b = first.config["architectures"][0], other.config["architectures"][0]
    if a != b:
        raise GenomeError(
            f"`{other.name}` is a {b}, but `{first.name}` is a {a}: parents must have one architecture"
        )
    if first.tied != other.tied:
        one, two = (first, other) if first.tied else (other, first)
        raise GenomeError(
            f"`{one.name}` ties its head to the embeddings and `{two.name}` does not "
            f"(`tie_word_embeddings`): "
            "parents must agree; take fine-tunes of one base model"
        )
    sizes = first.config.get("vocab_size"), other.config.get("vocab_size")
    if sizes[0] != sizes[1]:
        raise GenomeError(
            f"`{other.name}` has a vocabulary of {sizes[1]} and `{first.name}` one of {sizes[0]}: "
            f"parents must have "
            "the same; take fine-tunes that added no tokens, or trim the embeddings first"
        )
    _check_shapes(first, other)


def _check_shapes(first: _Parent, other: _Parent) -> None:
    for key, tensor in first.tensors.items():
        if key not in other.tensors:
            raise GenomeError(
                f"`{other.name}` has no tensor `{key}`, which `{first.name}` has with shape "
                f"{list(tensor.shape)}: "
                f"parents must have the same tensors ({len(other.tensors)} against {len(first.tensors)})"
            )
        shape = other.tensors[key].shape
        if shape != tensor.shape:
            raise GenomeError(
                f"tensor `{key}` has shape {list(shape)} in `{other.name}` and {list(tensor.shape)} in "
                f"`{first.name}`: parents must have the same shapes; take fine-tunes of one base model"
            )
    extra = [key for key in other.tensors if key not in first.tensors]
    if extra:
        raise GenomeError(
            f"`{other.name}` has a tensor `{extra[0]}` with shape {list(other.tensors[extra[0]].shape)}, "
            f"which "
            f"`{first.name}` lacks: parents must have the same tensors"
        )


def _check_vocabularies(parents: Sequence[_Parent], *, strict: bool) -> list[str]:
    notes = []
    first = headers.vocabulary(parents[0].located.folder)
    for other in parents[1:]:
        theirs = headers.vocabulary(other.located.folder)
        if not first or not theirs:
            continue
        common = first.keys() & theirs.keys()
        renamed = sorted(i for i in common if first[i] != theirs[i])
        if len(renamed) > _RENAMED * len(common) or (strict and first != theirs):
            example = (
                f": id {renamed[0]} is {first[renamed[0]]!r} in one, {theirs[renamed[0]]!r} in the other"
                if (renamed)
                else f": {len(first)} tokens against {len(theirs)}"
            )
            raise GenomeError(
                f"`{other.name}` and `{parents[0].name}` have different tokenizers{example}. Rows of the "
                f"embeddings "
                "would be mixed that stand for different tokens: take fine-tunes with one tokenizer"
                + (" (with `tokenizer_source`, llmevo needs them identical)" if strict else "")
            )
        if renamed or len(first) != len(theirs):
            notes.append(
                f"`{other.name}`: {len(renamed)} token ids have another meaning than in "
                f"`{parents[0].name}`, and it "
                f"has {len(theirs)} tokens against {len(first)}; the tokenizer of `{parents[0].name}` is used"
            )
    return notes


def _check_adapter(parent: _Parent) -> None:
    folder = parent.located.adapter
    assert folder is not None
    settings = headers.read_json(folder / "adapter_config.json", parent.name)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise GenomeError(
            f"`{parent.name}`: the adapter must be a PEFT LoRA, and `peft_type` in its "
            f"adapter_config.json is {kind!r}"
        )
    if settings.get("megatron_config"):
        raise GenomeError(
            f"`{parent.name}`: adapter_config.json has `megatron_config`, which makes peft import a "
            f"module that "
            "the file names; llmevo runs no such code: remove that entry"
        )
    factors = headers.tensors(folder, "adapter_model", parent.name)
    pairs = [key for key in factors if key.endswith(".lora_A.weight")]
    if not pairs and not any("lora_" in key for key in factors):
        raise GenomeError(f"`{parent.name}`: adapter_model.safetensors has no LoRA tensors: train it again")
    for key in pairs:
        _check_pair(parent, key, factors, transposed=bool(settings.get("fan_in_fan_out")))


def _check_pair(parent: _Parent, key: str, factors: Mapping[str, Tensor], *, transposed: bool) -> None:
    down = factors[key].shape
    partner = key.removesuffix("lora_A.weight") + "lora_B.weight"
    if partner not in factors:
        raise GenomeError(f"`{parent.name}`: the adapter has `{key}` without `{partner}`: train it again")
    up = factors[partner].shape
    target = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
    if target == _HEAD and parent.tied and target not in parent.tensors:
        raise GenomeError(
            f"`{parent.name}`: the adapter changes `{_HEAD}`, which is the embedding matrix in the base "
            "model (`tie_word_embeddings`) and has no weights of its own: untie and save the base model, or "
            "take an adapter that leaves the head alone"
        )
    if target not in parent.tensors:
        raise GenomeError(
            f"`{parent.name}`: the adapter changes `{target}`, which the base model does not have: it was "
            "trained on another model"
        )
    base = parent.tensors[target].shape
    fits = (down[1], up[0]) if transposed else (up[0], down[1])
    # For GPT-2's `Conv1D`, which holds its matrix the other way round, peft corrects a flag that is wrong.
    if base not in (fits, fits[::-1]) or down[0] != up[1]:
        raise GenomeError(
            f"`{parent.name}`: the adapter's `{target}` needs shape {list(fits)} (from A {list(down)} and "
            f"B {list(up)}), but the base model has {list(base)}: it was trained on another model"
        )
