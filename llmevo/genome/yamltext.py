"""YAML that a stranger may have written, as plain data: JSON types only, and bounded.

Nothing is executed (`SafeLoader`), and nothing explodes: the size of the text, the number of aliases, the
nesting and the size after all aliases are expanded are capped before any object is made. A key given twice
is an error, where PyYAML keeps the last one in silence. `1e-4` is a number, as in YAML 1.2 and as
everybody means it; PyYAML alone reads a string.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, final

import yaml

from llmevo.errors import GenomeError

MAX_BYTES = 1 << 20
MAX_ALIASES = 100
MAX_NODES = 100_000
MAX_DEPTH = 50


@final
class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 floats; it counts aliases and depth."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.aliases = 0
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one node, under the caps on aliases and depth."""
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MAX_ALIASES:
                raise GenomeError(f"it has more than {MAX_ALIASES} aliases (`*name`); write the values out")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise GenomeError(f"it nests deeper than {MAX_DEPTH} levels; flatten it")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


@final
class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper; it quotes a string that `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def _check(node: yaml.Node, path: str, sizes: dict[int, int]) -> int:
    """Expanded size of `node`; refuses cycles, keys given twice and keys that are not strings."""
    known = sizes.get(id(node))
    if known == 0:
        raise GenomeError(f"`{path}` contains itself through an alias; write the values out")
    if known is not None:
        return known
    sizes[id(node)] = 0
    total = 1
    if isinstance(node, yaml.SequenceNode):
        total += sum(_check(child, f"{path}.{index}", sizes) for index, child in enumerate(node.value))
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, child in node.value:
            line = key.start_mark.line + 1
            where = f"{path}.{key.value}" if path else str(key.value)
            if not isinstance(key, yaml.ScalarNode):
                raise GenomeError(f"line {line}: a key of `{path}` must be a string, but got a {key.id}")
            merge = key.tag == "tag:yaml.org,2002:merge"
            if not merge and key.tag != "tag:yaml.org,2002:str":
                raise GenomeError(
                    f"line {line}: the key `{where}` must be a string, but YAML reads {key.value!r} as "
                    f"{key.tag.rpartition(':')[2]}; put it in quotes"
                )
            if key.value in seen:
                raise GenomeError(
                    f"line {line}: the key `{where}` is given twice, first in line {seen[key.value]}; "
                    "remove one of the two"
                )
            seen[key.value] = line
            total += 1 + _check(child, where, sizes)
    if total > MAX_NODES:
        raise GenomeError(f"it has more than {MAX_NODES} values once its aliases are expanded; shorten it")
    sizes[id(node)] = total
    return total


def parse(text: str, source: str) -> Any:
    """The data in the YAML `text`: dict, list, str, int, float, bool, None (and YAML's dates).

    Args:
        text: At most 1 MiB in UTF-8.
        source: What messages call the text: a path, say.

    Raises:
        GenomeError: Not YAML, or one of the caps or rules of this module is broken.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise GenomeError(f"{source}: it must be at most {MAX_BYTES} bytes, but got {size}; shorten it.")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, "", {})
        return loader.construct_document(node)
    except GenomeError as error:
        raise GenomeError(f"{source}: {error}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise GenomeError(f"{source}{where}: this is not YAML: {error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise GenomeError(f"{source}: this is not YAML: {' '.join(str(error).split())}.") from None


def dump(data: Any) -> str:
    """YAML text in the order of `data`; `parse` gives the same data back."""

    def written(unicode: bool) -> str:
        text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=unicode, width=100)
        return text

    text = written(unicode=True)
    # PyYAML folds these rare line breaks where they stand for themselves; escaped they survive.
    return written(unicode=False) if any(char in text for char in "\x85\u2028\u2029\ufeff") else text


def override(data: Any, assignments: Sequence[str]) -> Any:
    """`data` with each of `a.b=value` applied; the value is YAML, and a number in the path indexes a list.

    Mappings that are missing on the way are made, so that a misspelt key is found by the model's check.

    Raises:
        GenomeError: No `=`, an empty key, a path through something that is neither mapping nor list, an
            index out of range, or a value that is not YAML.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise GenomeError(f"`--set {assignment}` must be KEY=VALUE, like search.trials=20.")
        value = parse(text, f"--set {assignment}")
        data = _assign(data, keys, value, assignment)
    return data


def _assign(data: Any, keys: list[str], value: Any, assignment: str) -> Any:
    """A copy of `data` with `value` at the path `keys`; the input stays as it was."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if data is None:
        data = {}
    if isinstance(data, dict):
        return {**data, key: _assign(data.get(key), rest, value, assignment)}
    if isinstance(data, list) and key.isdecimal() and int(key) < len(data):
        index = int(key)
        return [*data[:index], _assign(data[index], rest, value, assignment), *data[index + 1 :]]
    kind = f"a list of {len(data)}" if isinstance(data, list) else repr(data)
    raise GenomeError(
        f"`--set {assignment}`: {key!r} must be a key of a mapping or an index, but got {kind}."
    )
