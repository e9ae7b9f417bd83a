"""Names for merged weights: equal where the weights are equal by construction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from llmevo.merge import hashes, headers
from llmevo.merge.references import Located
from llmevo.merge.resolve import Resolved, Skeleton

# To be raised with every change to the fast mode's arithmetic: answers that are kept are for the old weights.
ARITHMETIC = 2
_DRAWING = ("dare_ties", "dare_linear", "della", "della_linear")


def content(located: Located) -> str:
    """Return the hash of a model's weights and of its adapter; the names of files do not matter."""
    digest = hashlib.blake2b(digest_size=16)
    files = [(path, False) for path in headers.weight_files(located.folder, "model", located.name)]
    if located.adapter is not None:
        files += [
            (path, True) for path in headers.weight_files(located.adapter, "adapter_model", located.name)
        ]
        files.append((located.adapter / "adapter_config.json", True))
    for path, of_adapter in files:
        digest.update(hashes.of_file(path) + bytes([of_adapter]))
    return digest.hexdigest()


def of_plain(recipe: Any) -> str:
    """Return the name of a recipe whose models are replaced by their contents' hashes."""
    return _hash(json.dumps(recipe, sort_keys=True, default=str).encode())


def of_resolved(resolved: Resolved, contents: Mapping[Any, str]) -> str:
    """Return the name of a resolved recipe.

    Args:
        resolved: The recipe.
        contents: The hash of each model's content, by mergekit's reference.
    """
    parts = [_structure(resolved.skeleton, contents)]
    for name, values in sorted(resolved.values.items()):
        parts += [name.encode(), values.tobytes()]
    return _hash(*parts)


def draws(method: Any) -> bool:
    """Whether a method has random masks, so that the seed is part of the name."""
    return method in _DRAWING


def _structure(skeleton: Skeleton, contents: Mapping[Any, str]) -> bytes:
    rows = [
        [
            target.name,
            [contents[m] for m in target.models],
            target.inputs,
            target.base,
            dict(target.constants),
        ]
        for target in skeleton.targets
    ]
    return json.dumps([skeleton.method, rows], sort_keys=True, default=str).encode()


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
