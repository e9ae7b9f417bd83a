"""pydantic's validation errors in plain words: the dotted key, what must hold, what was given, what to do."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

# Tags of the discriminated unions in genome.py; pydantic puts them into an error's location.
TAGS = frozenset(
    {"<float>", "<int>", "<choice>", "<models>", "<fixed>", "<one>", "<many>", "<path>", "<recipe>", "<list>"}
)


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One sentence for each thing that is wrong.

    Args:
        error: What `model.model_validate` raised.
        model: The root model; its fields are what a misspelt key is compared with.
    """
    return [_sentence(detail, model) for detail in error.errors(include_url=False)]


def _sentence(detail: Any, model: type[BaseModel]) -> str:
    keys = [str(part) for part in detail["loc"] if part not in TAGS]
    name = ".".join(keys)
    kind, message = detail["type"], str(detail["msg"])
    if kind == "extra_forbidden":
        return _unknown(keys, model)
    if kind == "missing":
        return f"`{name}` is missing; add it."
    if kind == "value_error":
        message = str(detail["ctx"]["error"])
        lead = f"`{name}` " if name and message.startswith("must ") else f"`{name}`: " if name else ""
        return f"{lead}{message.rstrip('.')}."
    for old in ("Input should be", "Input should have", "Keys should be"):
        message = message.replace(old, old.replace("Input should", "must").replace("should", "must"))
    message = message.removeprefix("Value ").replace("List should have", "must have")
    if not message.startswith("must"):
        message = f"must be valid ({message})"
    return f"`{name}` {message}, but got {_short(detail['input'])}."


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unknown(keys: list[str], model: type[BaseModel]) -> str:
    name, parent = ".".join(keys), keys[:-1]
    paths = list(_paths(model, ()))
    siblings = [path[-1] for path in paths if list(path[:-1]) == _generic(parent)]
    near = difflib.get_close_matches(keys[-1], siblings, n=1)
    if near:
        return f"`{name}` is not a key; did you mean `{'.'.join([*parent, near[0]])}`?"
    leaves = {path[-1]: ".".join(path) for path in reversed(paths)}
    elsewhere = difflib.get_close_matches(keys[-1], leaves, n=1, cutoff=0.75)
    if elsewhere:
        return f"`{name}` is not a key; did you mean `{leaves[elsewhere[0]]}`?"
    known = f" Known here: {', '.join(siblings)}." if siblings else ""
    return f"`{name}` is not a key; remove it.{known}"


def _generic(keys: list[str]) -> list[str]:
    """List indices as `*`, as in `_paths`."""
    return ["*" if key.isdecimal() else key for key in keys]


def _paths(model: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every path of keys that `model` knows; `*` stands for an index of a list."""
    for name, field in model.model_fields.items():
        path = (*prefix, field.alias or name)
        yield path
        yield from _inside(field.annotation, path)


def _inside(annotation: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from _paths(annotation, path)
        return
    origin = typing.get_origin(annotation)
    if origin is list:
        path = (*path, "*")
    if origin in (list, typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation):
            yield from _inside(argument, path)
