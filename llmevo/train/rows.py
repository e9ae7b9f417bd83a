"""The rows of training data: read from files or by `datasets`, and checked, each with the place to name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from llmevo.errors import GenomeError

_KINDS = ("messages", "prompt", "text")
_ONE_A_LINE = "write each row as one object in a line of its own"
_RENAME = "rename the columns, or say in `train.data.columns` which is which"
_JSON = {list: "list", str: "text", int: "number", float: "number", bool: "truth value"}
_SHOWN = 40  # characters of a bad line
_FILES = (".jsonl", ".json", ".parquet")


@final
@dataclass(frozen=True, slots=True)
class Row:
    """A row, checked.

    Args:
        where: The place to name when something is wrong with it.
        kind: `messages`, `prompt`, `text`, or `label` for a head that is not a language model's.
        content: Its columns.
    """

    where: str
    kind: str
    content: dict[str, Any]


def read(source: str, columns: Mapping[Any, str], head: str) -> list[Row]:
    """The rows of a file, or of a data set for `datasets`.

    Args:
        source: A path, or `NAME[split]`; see `DataSpec`.
        columns: From our names of columns to the source's.
        head: `train.head`.

    Raises:
        GenomeError: A file is not there, has no rows, or a row is not an example.
    """
    path = Path(source)
    if path.is_file():
        found = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    elif path.suffix in _FILES:
        raise GenomeError(f"`train.data` must name files, but {source!r} is not one; check the path.")
    else:
        found = _data_set(source)
    check = _check_labelled if head != "lm" else _check_row
    rows = [check(where, _renamed(where, content, columns), head) for where, content in found]
    if not rows:
        raise GenomeError(f"`train.data` must have rows, but {source} has none; add examples.")
    kinds = sorted({row.kind for row in rows})
    if len(kinds) > 1:
        raise GenomeError(
            f"`train.data`: all rows of {source} must be of one kind, but there are rows with "
            f"{' and with '.join(kinds)}; write them to files of their own."
        )
    return rows


def _renamed(where: str, content: Any, columns: Mapping[Any, str]) -> Any:
    if not columns or not isinstance(content, dict):
        return content
    for ours, theirs in columns.items():
        if theirs not in content and ours != "text_pair":
            raise GenomeError(
                f"{where}: `train.data.columns` takes {ours!r} from {theirs!r}, which is not there; name "
                f"some of {', '.join(sorted(content))}."
            )
    taken = {ours: content[theirs] for ours, theirs in columns.items() if theirs in content}
    return {**{key: content[key] for key in content if key not in columns.values()}, **taken}


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise GenomeError(
            f"`train.data`: {path} must be JSON lines in UTF-8, but cannot be read ({error}); write it anew."
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"`train.data`: {path}, line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            raise GenomeError(
                f"{where}: each line must be a JSON object, but this one is not ({reason}): "
                f"{_short(line)}; {_ONE_A_LINE}."
            ) from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise GenomeError(
            f"`train.data`: {path} must be a parquet file, but cannot be read ({reason}); write it anew."
        ) from None
    for number, row in enumerate(rows):
        # A column that some rows lack is null there.
        yield f"`train.data`: {path}, row {number}", _without_nulls(row)


def _data_set(source: str) -> Iterator[tuple[str, Any]]:
    """The rows of `NAME[split]`, a folder that `datasets` wrote or reads, or a name on the hub."""
    import datasets

    name, split = _named(source)
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
            if isinstance(found, datasets.DatasetDict):
                found = found[split]
            elif split != str(found.split or "train"):
                raise KeyError(f"it has no splits, so no {split!r}")
        else:
            found = datasets.load_dataset(name, split=split)
    except Exception as error:  # its own kinds, the hub's, pyarrow's, KeyError for a split
        reason = " ".join(str(error).split())[:300]
        raise GenomeError(
            f"`train.data` must name a file, or what `datasets` reads as NAME or NAME[split], but "
            f"{source!r} is neither ({type(error).__name__}: {reason}); check the path, the name and the "
            "split."
        ) from None
    finally:
        if bars:
            datasets.enable_progress_bar()
    names: dict[str, Callable[[int], str]] = {
        column: feature.int2str
        for column, feature in found.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    for number, row in enumerate(found):
        # Test splits that keep their labels to themselves have -1.
        named = {key: names[key](row[key]) for key in names if row[key] is not None and row[key] >= 0}
        yield f"`train.data`: {source}, row {number}", _without_nulls({**row, **named})


def _named(source: str) -> tuple[str, str]:
    """`NAME[split]` apart; `train` is the split that is meant where none is named."""
    name, bracket, rest = source.partition("[")
    return (name, rest[:-1]) if bracket and rest.endswith("]") else (source, "train")


def _without_nulls(value: Any) -> Any:
    """A row as it was before a table gave every object of a column the keys of all the others."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _check_row(where: str, content: Any, head: str) -> Row:
    kind = next((k for k in _KINDS if isinstance(content, dict) and k in content), None)
    if kind is None:
        raise GenomeError(
            f"{where}: an example must have `text`, `prompt` and `completion`, or `messages`, but "
            f"{_keys(content)}."
        )
    if kind == "messages":
        return Row(where, kind, {"messages": _messages(where, content["messages"]), **_tools(where, content)})
    for key in ("prompt", "completion") if kind == "prompt" else ("text",):
        _check_text(where, content, key, may_be_empty=key == "prompt")
    return Row(where, kind, content)


def _check_labelled(where: str, content: Any, head: str) -> Row:
    if not isinstance(content, dict) or "text" not in content or "label" not in content:
        raise GenomeError(
            f"{where}: with the head {head} an example must have `text` and `label`, but {_keys(content)}."
        )
    _check_text(where, content, "text")
    if "text_pair" in content:
        _check_text(where, content, "text_pair")
    label = content["label"]
    if head == "regression" and not _finite(label):
        raise GenomeError(f"{where}: `label` must be a finite number, but got {label!r}; mend it.")
    whole = isinstance(label, int) and (isinstance(label, bool) or label >= 0)
    if head == "classification" and not (whole or (isinstance(label, str) and label)):
        raise GenomeError(
            f"{where}: `label` must be a text or a whole number >= 0, but got {label!r}; for numbers to be "
            "predicted set `train.head: regression`."
        )
    return Row(where, "label", content)


def _finite(label: Any) -> bool:
    try:
        return isinstance(label, (int, float)) and not isinstance(label, bool) and math.isfinite(label)
    except OverflowError:  # a whole number beyond a float's
        return False


def _keys(content: Any) -> str:
    """What a row has in place of what it should have, and what to do."""
    if not isinstance(content, dict):
        return f"this is the {_JSON.get(type(content), 'null')} {_short(content)}; {_ONE_A_LINE}"
    return f"it has only {', '.join(sorted(content)) or 'nothing'}; {_RENAME}"


def _short(value: Any) -> str:
    text = str(value).strip()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _check_text(where: str, content: dict[str, Any], key: str, may_be_empty: bool = False) -> None:
    value = content.get(key)
    if not isinstance(value, str) or not (value or may_be_empty):
        got = f"got {_short(repr(value))}" if key in content else "the row has none"
        may = "text" if may_be_empty else "text that is not empty"
        raise GenomeError(f"{where}: `{key}` must be a {may}, but {got}; fill it in, or remove the row.")
    _check_unicode(where, key, value)


def _messages(where: str, messages: Any) -> list[dict[str, Any]]:
    """The messages of a chat, checked; those that only call tools have an empty `content`."""
    good = isinstance(messages, list) and all(
        isinstance(m, dict)
        and isinstance(m.get("role"), str)
        and (isinstance(m.get("content"), str) or (m.get("content") is None and m.get("tool_calls")))
        for m in messages
    )
    if not good:
        raise GenomeError(
            f"{where}: `messages` must be a list of `role` and `content`, both texts (`content` may be "
            "missing beside `tool_calls`); mend it."
        )
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise GenomeError(
            f"{where}: `messages` must hold an assistant's turn after another's, but the roles are {roles}; "
            "add the answer, or remove the row."
        )
    _check_unicode(where, "messages", json.dumps(messages, ensure_ascii=False, default=str))
    return [message if message.get("content") else {**message, "content": ""} for message in messages]


def _tools(where: str, content: dict[str, Any]) -> dict[str, Any]:
    """What the chat template is told of tools: the column `tools`, a list of objects or that as JSON."""
    tools = content.get("tools")
    if isinstance(tools, str):
        with suppress(ValueError):  # it stays a text then, and is refused
            tools = json.loads(tools) if tools.strip() else None
    if not tools:
        return {}
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise GenomeError(
            f"{where}: `tools` must be a list of JSON schemas, or one written as JSON, but got "
            f"{_short(repr(tools))}; mend it, or rename the column."
        )
    _check_unicode(where, "tools", json.dumps(tools, ensure_ascii=False, default=str))
    return {"tools": tools}


def _check_unicode(where: str, key: str, text: str) -> None:
    """Raise GenomeError for half of a surrogate pair, which JSON can escape and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GenomeError(
            f"{where}: `{key}` must be Unicode text, but has half of a surrogate pair "
            f"(\\u{ord(text[error.start]):04x}); mend it, or remove the row."
        ) from None
