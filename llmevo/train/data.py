"""The examples of a training: split, tokenised with the tokens to learn marked, checked, and packed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import numpy as np
import numpy.typing as npt

from llmevo.errors import GenomeError
from llmevo.genome.train import DataSpec
from llmevo.train.example import Example as Example
from llmevo.train.rows import Row, read
from llmevo.train.tokenise import Kind, shorten, tokenise

Part: TypeAlias = Literal["train", "validation", "test", "general", "general_test"]

PARTS: tuple[Part, ...] = ("train", "validation", "test")
_SPLIT_STREAM = 0x7261696E  # keeps the split's random numbers apart from others of the same seed


@final
@dataclass(frozen=True, slots=True)
class Examples:
    """The tokenised examples of a run.

    Args:
        parts: Examples by part, in stored order.
        dropped: Rows that were longer than `max_length` and dropped, by part.
        cut: Rows that were cut off there, by part.
        repeated: How many rows of the validation and test part are rows of the training part, too.
        labels: The classes, by number; empty where nothing is classified.
        chat: Whether the training rows are `messages`.
    """

    parts: dict[Part, list[Example]]
    dropped: dict[Part, int]
    cut: dict[Part, int]
    repeated: dict[Part, int]
    labels: list[str | int]
    chat: bool

    def describe(self) -> dict[str, Any]:
        """Facts for the run's record, as JSON; `fingerprint` changes with any token."""
        digest = hashlib.sha256()
        for part, examples in self.parts.items():
            for example in examples:
                digest.update(_identity(example) + b"|")
            digest.update(part.encode())
        return {
            "examples": {part: len(examples) for part, examples in self.parts.items()},
            "tokens": {part: sum(map(len, examples)) for part, examples in self.parts.items()},
            "targets": {
                part: int(sum(example.targets.sum() for example in examples))
                for part, examples in self.parts.items()
            },
            "dropped": self.dropped,
            "cut": self.cut,
            "repeated": self.repeated,
            "labels": self.labels,
            "fingerprint": digest.hexdigest(),
        }


def load(spec: DataSpec, tokenizer: Any, context: int, seed: int, kind: Kind = "causal") -> Examples:
    """Read, split and tokenise the examples.

    Args:
        spec: Where they are.
        tokenizer: The model's tokenizer.
        context: Most tokens that the model takes.
        seed: Of the split, where a part is a share of the training file.
        kind: Of model.

    Raises:
        GenomeError: A file or row is wrong, a part is empty, or an example is too long.
    """
    longest = min(spec.max_length or context, context)
    if spec.max_length is not None and spec.max_length > context:
        raise GenomeError(
            f"`train.data.max_length` must be <= {context}, the model's context, but got {spec.max_length}; "
            "lower it."
        )
    rows = _split(spec, seed, kind if kind in ("classification", "regression") else "lm")
    labels = _labels(rows) if kind == "classification" else []
    parts: dict[Part, list[Example]] = {}
    dropped: dict[Part, int] = {}
    cut: dict[Part, int] = {}
    for part in (*PARTS, *(part for part in rows if part not in PARTS)):
        examples = [tokenise(row, tokenizer, kind, labels) for row in rows[part]]
        over = [index for index, example in enumerate(examples) if _width(example) > longest]
        if over and spec.too_long == "error":
            worst = max(over, key=lambda index: _width(examples[index]))
            raise GenomeError(
                f"{rows[part][worst].where}: an example must have <= {longest} tokens, but it has "
                f"{_width(examples[worst])}, and {len(over)} of {len(examples)} in the {part} part are too "
                "long; shorten them, raise `train.data.max_length` up to the model's context, or set "
                "`train.data.too_long` to drop or cut."
            )
        if spec.too_long == "cut":
            for index in over:
                examples[index] = shorten(examples[index], longest, tokenizer)
        parts[part] = [e for e in examples if _width(e) <= longest and e.targets.any()]
        cut[part] = len(over) if spec.too_long == "cut" else 0
        dropped[part] = len(examples) - len(parts[part])
        if not parts[part]:
            became = "cut off before their first token to learn" if cut[part] else "dropped for being longer"
            raise GenomeError(
                f"`train.data` must give the {part} part at least one example, but with at most {longest} "
                f"tokens all {len(examples)} were {became}; raise `train.data.max_length` up to the model's "
                f"context, {context}, or shorten them."
            )
    known = {_identity(e) for e in parts["train"]}
    repeated: dict[Part, int] = {
        part: sum(_identity(e) in known for e in found) for part, found in parts.items() if part != "train"
    }
    return Examples(parts, dropped, cut, repeated, labels, rows["train"][0].kind == "messages")


def _identity(example: Example) -> bytes:
    """Equal for examples that ask and teach the same."""
    value = np.float64(example.value).tobytes() if example.value else b""
    return example.tokens.tobytes() + example.targets.tobytes() + value


def _width(example: Example) -> int:
    """The longest run of tokens that goes through the model at once."""
    return max(example.border, len(example) - example.border)


def _labels(rows: dict[Part, list[Row]]) -> list[str | int]:
    """The classes in order: whole numbers by size, names by the alphabet."""
    found: dict[str | int, Row] = {}
    for part in PARTS:
        for row in rows[part]:
            label = row.content["label"]
            if part != "train" and label not in found:
                raise GenomeError(
                    f"{row.where}: its label must be one of the training part's, but {label!r} is not; add "
                    "examples of it, or remove it."
                )
            found.setdefault(label, row)
    kinds = {type(label) for label in found}
    if len(kinds) > 1:
        odd = next(row for label, row in found.items() if type(label) is not type(next(iter(found))))
        raise GenomeError(
            f"{odd.where}: all labels must be texts or all whole numbers, but {odd.content['label']!r} is of "
            "another kind than those before; write all in one way."
        )
    if len(found) < 2:
        raise GenomeError(
            f"`train.data` must have at least two labels to tell apart, but has only {next(iter(found))!r}; "
            "add examples."
        )
    return sorted(found, key=lambda label: (str(label) if isinstance(label, str) else "", label))


def _split(spec: DataSpec, seed: int, head: str) -> dict[Part, list[Row]]:
    rows = read(spec.train, spec.columns, head)
    order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(len(rows)).tolist()
    found: dict[Part, list[Row]] = {}
    sources: list[tuple[Part, str | float]] = [("test", spec.test), ("validation", spec.validation)]
    for part, source in sources:
        if isinstance(source, str):
            found[part] = read(source, spec.columns, head)
            continue
        count = max(round(source * len(rows)), 1)
        if count >= len(order):
            raise GenomeError(
                f"`train.data.train` must hold enough examples for all parts, but {spec.train} has "
                f"{len(rows)}; add examples, or give `validation` and `test` files of their own."
            )
        found[part] = [rows[index] for index in order[:count]]
        order = order[count:]
    # What is left for training keeps the file's order: each epoch shuffles it anyway.
    found["train"] = [rows[index] for index in sorted(order)]
    return found | (_general(spec, seed, head) if spec.general is not None else {})


def _general(spec: DataSpec, seed: int, head: str) -> dict[Part, list[Row]]:
    """The examples of another kind: for the search, and held out."""
    assert spec.general is not None
    rows = read(spec.general, spec.columns, head)
    if isinstance(spec.general_test, str):
        return {"general": rows, "general_test": read(spec.general_test, spec.columns, head)}
    count = max(round(spec.general_test * len(rows)), 1)
    if count >= len(rows):
        raise GenomeError(
            f"`train.data.general` must hold enough examples for two parts, but {spec.general} has "
            f"{len(rows)}; add examples, or give `general_test` a file of its own."
        )
    order = np.random.default_rng([seed, _SPLIT_STREAM, 1]).permutation(len(rows)).tolist()
    return {
        "general": [rows[index] for index in order[count:]],
        "general_test": [rows[index] for index in order[:count]],
    }


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put examples into rows of at most `capacity` tokens, the longest first, each where it first fits.

    Args:
        lengths: Tokens of each example.
        capacity: Of a row; an example that is longer has a row of its own.

    Returns:
        Indices of the examples of each row; every example once.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, left in enumerate(room):
            if lengths[index] <= left:
                rows[row].append(index)
                room[row] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(max(capacity - lengths[index], 0))
    return rows


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """Examples laid out for a forward pass.

    Args:
        tokens: Token ids, shape (rows, width), with zeros behind the last example of a row.
        positions: Each token's position in its own example, shape (rows, width).
        sources: Flat indices of the positions that predict a target, shape (targets,).
        labels: The tokens to predict there, shape (targets,).
        owners: To which example each target belongs, shape (targets,).
        starts: Flat index of each example's first token, shape (examples,).
        lengths: Tokens of each example, shape (examples,).
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    owners: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


def lay_out(examples: Sequence[Example], packed: bool, width: int = 0) -> Batch:
    """Lay examples out in rows: as few as `width` allows, at least the longest one's, or one for each.

    Positions start anew with each example of a row, which is how transformers knows that they must not see
    each other. Without packing no mask is needed: what follows an example is seen by nobody.
    """
    lengths = [len(example) for example in examples]
    width = max(width, *lengths) if packed else max(lengths)
    rows = pack(lengths, width) if packed else [[index] for index in range(len(examples))]
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.tile(np.arange(width, dtype=np.int64), (len(rows), 1))
    sources, labels, owners = [], [], []
    starts = np.zeros(len(examples), dtype=np.int64)
    for row, members in enumerate(rows):
        at = 0
        for index in members:
            example = examples[index]
            end = at + len(example)
            starts[index] = row * width + at
            tokens[row, at:end] = example.tokens
            if packed:
                positions[row, at:] = np.arange(width - at)
            where = np.flatnonzero(example.targets)
            sources.append(row * width + at + where - 1)
            labels.append(example.tokens[where])
            owners.append(np.full(len(where), index, dtype=np.int64))
            at = end
        if packed and at < width:
            positions[row, at:] = np.arange(width - at)
    where, wanted, whose = (np.concatenate(parts) for parts in (sources, labels, owners))
    return Batch(tokens, positions, where, wanted, whose, starts, np.array(lengths, dtype=np.int64))
