"""The import rule: rows point downward, and `import llmevo` needs numpy and nothing heavier."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llmevo

_ROOT = Path(llmevo.__file__).parent

# From top to bottom. A module may import from rows below its own, and from its own unit; units that share
# a row do not import each other. A package stands for all of its modules.
ROWS: list[list[str]] = [
    ["cli"],
    ["report"],
    ["runner"],
    ["store", "executors"],
    ["pipeline"],
    ["fitness"],
    ["recipe", "merge", "train", "evaluate"],
    ["optimizer"],
    ["proposers"],
    ["llm"],
    ["genome", "strength", "stats"],
    ["trial"],
    ["space", "gene"],
    ["attention"],
    ["rundir", "resources", "embedded", "usercache", "quiet", "hub"],
    ["errors"],
]
_UNITS = {"gene": "space"}  # modules that belong to another's unit
_PLACES = {name: (level, _UNITS.get(name, name)) for level, row in enumerate(ROWS) for name in row}
HEAVY = ("torch", "ray", "wandb", "optuna", "transformers", "scipy", "pydantic", "openai", "typer", "rich")


def top(module: str) -> str:
    """`llmevo.merge.plan` -> `merge`."""
    return module.split(".")[1]


def name_of(path: Path) -> str:
    parts = path.relative_to(_ROOT.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(source: str, module: str, is_package: bool) -> list[str]:
    """Modules of llmevo that `source` imports anywhere, in functions and under TYPE_CHECKING too."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("llmevo.")]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            if origin == "llmevo":
                found += [f"llmevo.{alias.name}" for alias in node.names]
            elif origin.startswith("llmevo."):
                found.append(origin)
    return found


def complaint(source: str, module: str, is_package: bool = False) -> list[str]:
    level, unit = _PLACES[top(module)]
    wrong = []
    for target in imports(source, module, is_package):
        if target == "llmevo.__version__":
            continue
        other_level, other_unit = _PLACES[top(target)]
        if other_level < level or (other_level == level and other_unit != unit):
            wrong.append(f"{module} imports {target}")
    return wrong


MODULES = sorted(path for path in _ROOT.rglob("*.py") if path != _ROOT / "__init__.py")


def test_every_module_has_a_row_and_every_row_its_modules() -> None:
    assert {top(name_of(path)) for path in MODULES} == set(_PLACES)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downward(path: Path) -> None:
    assert not complaint(path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py")


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from llmevo.cli import app", "llmevo.store"),
        ("def f():\n    import llmevo.runner", "llmevo.optimizer"),
        ("from llmevo import merge", "llmevo.evaluate.tasks"),
        ("from ..evaluate import check_tasks", "llmevo.merge.plan"),
        ("if True:\n    from llmevo.proposers.cma import CMA", "llmevo.llm.encode"),
    ],
)
def test_the_rule_finds_what_it_forbids(source: str, module: str) -> None:
    assert complaint(source, module)


def test_import_llmevo_is_numpy_only_and_quick() -> None:
    code = (
        "import sys, json; before = set(sys.modules); import llmevo;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(json.dumps(sorted(new - set(sys.stdlib_module_names))))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    loaded = set(json.loads(done.stdout))
    assert "llmevo" in loaded
    assert not loaded & set(HEAVY)
    assert loaded <= {"llmevo", "numpy"}
    assert seconds < 1.0 or _is_busy()


def _is_busy() -> bool:
    """Whether this machine cannot even start Python with numpy in half a second just now."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import numpy"], check=True)
    return time.perf_counter() - start > 0.5
