"""The examples of a training: read, checked, tokenised with the tokens to learn marked, split, and packed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import numpy as np
import numpy.typing as npt

from llmevo.errors import GenomeError
from llmevo.genome.train import DataSpec

Part: TypeAlias = Literal["train", "validation", "test"]

PARTS: tuple[Part, ...] = ("train", "validation", "test")
_SPLIT_STREAM = 0x7261696E  # keeps the split's random numbers apart from others of the same seed
_KINDS = ("messages", "prompt", "text")


@final
@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised example.

    Args:
        tokens: Token ids, shape (length,), at least two.
        targets: Which of them are learnt, shape (length,); never the first, which nothing predicts.
    """

    tokens: npt.NDArray[np.int64]
    targets: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)


@final
@dataclass(frozen=True, slots=True)
class Examples:
    """The tokenised examples of a run.

    Args:
        parts: Examples by part, in stored order.
        dropped: Rows that were longer than `max_length` and dropped, by part.
        cut: Rows that were cut off there, by part.
        repeated: How many rows of the validation and test part are rows of the training part, too.
    """

    parts: dict[Part, list[Example]]
    dropped: dict[Part, int]
    cut: dict[Part, int]
    repeated: dict[Part, int]

    def describe(self) -> dict[str, Any]:
        """Facts for the run's record, as JSON; `fingerprint` changes with any token."""
        digest = hashlib.sha256()
        for part in PARTS:
            for example in self.parts[part]:
                digest.update(example.tokens.tobytes() + example.targets.tobytes() + b"|")
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
            "fingerprint": digest.hexdigest(),
        }


@final
@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a file, checked, with the place to name when something is wrong with it."""

    where: str
    kind: str
    content: dict[str, Any]


def check_data(spec: DataSpec) -> dict[str, int]:
    """Read and check the files, without a tokenizer; return the number of rows of each.

    Raises:
        GenomeError: A file is not there, has no rows, or a row is not an example.
    """
    files = [spec.train, *(f for f in (spec.validation, spec.test) if isinstance(f, str))]
    return {file: len(_read(Path(file))) for file in files}


def load(spec: DataSpec, tokenizer: Any, context: int, seed: int) -> Examples:
    """Read, split and tokenise the examples.

    Args:
        spec: Where they are.
        tokenizer: The model's tokenizer.
        context: Most tokens that the model takes.
        seed: Of the split, where a part is a share of the training file.

    Raises:
        GenomeError: A file or row is wrong, a part is empty, or an example is too long.
    """
    longest = min(spec.max_length or context, context)
    if spec.max_length is not None and spec.max_length > context:
        raise GenomeError(
            f"`train.data.max_length` must be <= {context}, the model's context, but got {spec.max_length}."
        )
    rows = _split(spec, seed)
    parts: dict[Part, list[Example]] = {}
    dropped: dict[Part, int] = {}
    cut: dict[Part, int] = {}
    for part in PARTS:
        examples = [_tokenise(row, tokenizer) for row in rows[part]]
        over = [index for index, example in enumerate(examples) if len(example) > longest]
        if over and spec.too_long == "error":
            worst = max(over, key=lambda index: len(examples[index]))
            raise GenomeError(
                f"{rows[part][worst].where}: an example must have <= {longest} tokens, but it has "
                f"{len(examples[worst])}, and {len(over)} of {len(examples)} in the {part} part are too "
                "long; shorten them, raise `train.data.max_length` up to the model's context, or set "
                "`train.data.too_long` to drop or cut."
            )
        kept = [_shorten(e, longest) if spec.too_long == "cut" else e for e in examples]
        parts[part] = [e for e in kept if len(e) <= longest and e.targets.any()]
        cut[part] = len(over) if spec.too_long == "cut" else 0
        dropped[part] = len(kept) - len(parts[part])
        if not parts[part]:
            raise GenomeError(
                f"`train.data` must give the {part} part at least one example, but all {len(examples)} were "
                f"dropped for being longer than {longest} tokens; raise `train.data.max_length`."
            )
    known = {_identity(e) for e in parts["train"]}
    repeated = {part: sum(_identity(e) in known for e in parts[part]) for part in PARTS[1:]}
    return Examples(parts, dropped, cut, repeated)


def _identity(example: Example) -> bytes:
    return example.tokens.tobytes() + example.targets.tobytes()


def _shorten(example: Example, longest: int) -> Example:
    return Example(example.tokens[:longest], example.targets[:longest])


def _split(spec: DataSpec, seed: int) -> dict[Part, list[_Row]]:
    rows = _read(Path(spec.train))
    order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(len(rows)).tolist()
    found: dict[Part, list[_Row]] = {}
    sources: list[tuple[Part, str | float]] = [("test", spec.test), ("validation", spec.validation)]
    for part, source in sources:
        if isinstance(source, str):
            found[part] = _read(Path(source))
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
    return found


def _read(path: Path) -> list[_Row]:
    if not path.is_file():
        raise GenomeError(f"`train.data` must name files, but {str(path)!r} is not one; check the path.")
    source = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    rows = [_check_row(where, content) for where, content in source]
    if not rows:
        raise GenomeError(f"`train.data` names {path}, which has no rows; add examples.")
    kinds = sorted({row.kind for row in rows})
    if len(kinds) > 1:
        raise GenomeError(
            f"{path}: all rows must be of one kind, but there are rows with {' and with '.join(kinds)}; "
            "write them to files of their own."
        )
    return rows


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise GenomeError(f"{path}: it must be JSON lines in UTF-8, but cannot be read ({error}).") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise GenomeError(f"{where}: it must be a JSON object, but is not ({error}).") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise GenomeError(f"{path}: it must be a parquet file, but cannot be read ({reason}).") from None
    for number, row in enumerate(rows):
        # A column that some rows lack is null there.
        yield f"{path}, row {number}", {key: value for key, value in row.items() if value is not None}


def _check_row(where: str, content: Any) -> _Row:
    kind = next((k for k in _KINDS if isinstance(content, dict) and k in content), None)
    if kind is None:
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise GenomeError(
            f"{where}: an example must have `text`, `prompt` and `completion`, or `messages`, but got {keys}."
        )
    if kind == "messages":
        _check_messages(where, content["messages"])
        return _Row(where, kind, content)
    for key in ("prompt", "completion") if kind == "prompt" else ("text",):
        value = content.get(key)
        if not isinstance(value, str) or not (value or key == "prompt"):
            raise GenomeError(f"{where}: `{key}` must be a text that is not empty, but got {value!r}.")
    return _Row(where, kind, content)


def _check_messages(where: str, messages: Any) -> None:
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good:
        raise GenomeError(f"{where}: `messages` must be a list of `role` and `content`, both texts.")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise GenomeError(
            f"{where}: `messages` must hold an assistant's turn after another's, but the roles are {roles}."
        )


def _tokenise(row: _Row, tokenizer: Any) -> Example:
    if row.kind == "messages":
        example = _chat(row, tokenizer)
    else:
        prompt = row.content["prompt"] if row.kind == "prompt" else ""
        text = prompt + row.content["completion" if row.kind == "prompt" else "text"]
        tokens = list(tokenizer(text).input_ids)
        # The longest common beginning: a token that spans the border belongs to the completion.
        known = _common(tokens, tokenizer(prompt).input_ids) if prompt else 0
        end = tokenizer.eos_token_id
        if end is not None and tokens[-1:] != [end]:
            tokens.append(end)
        example = _example(tokens, [(known, len(tokens))])
    if not example.targets.any():
        raise GenomeError(
            f"{row.where}: it must have at least one token to learn after the first, but has "
            f"{len(example)} tokens and none to learn; lengthen or remove it."
        )
    return example


def _chat(row: _Row, tokenizer: Any) -> Example:
    if not getattr(tokenizer, "chat_template", None):
        raise GenomeError(
            f"{row.where}: `messages` need a tokenizer with a chat template, but the model's has none; give "
            "`prompt` and `completion`."
        )
    messages = row.content["messages"]

    def render(count: int, answer: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=answer)
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    tokens = render(len(messages), False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, True), render(index + 1, False)
        start, end = _common(tokens, before), _common(tokens, after)
        # The last token of a turn may merge with what follows, so one may differ; more is another text.
        if start < len(before) - 1 or end < len(after) - 1 or start >= end:
            raise GenomeError(
                f"{row.where}: turn {index} reads otherwise once later turns follow, as the chat template "
                "rewrites earlier ones; give each answer as `prompt` and `completion`."
            )
        spans.append((start, end))
    return _example(tokens, spans)


def _example(tokens: Sequence[int], spans: Sequence[tuple[int, int]]) -> Example:
    targets = np.zeros(len(tokens), dtype=bool)
    for start, end in spans:
        targets[start:end] = True
    targets[:1] = False
    return Example(np.array(tokens, dtype=np.int64), targets)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


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
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    owners: npt.NDArray[np.int64]


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
    for row, members in enumerate(rows):
        at = 0
        for index in members:
            example = examples[index]
            end = at + len(example)
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
    return Batch(tokens, positions, np.concatenate(sources), np.concatenate(labels), np.concatenate(owners))
