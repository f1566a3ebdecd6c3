"""The house rules: who may import whom, and what `import imbalanced_losses` brings along."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import imbalanced_losses

PACKAGE = Path(imbalanced_losses.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]
EACH_FILE = pytest.mark.parametrize("path", FILES, ids=NAMES)

# A layer imports from the layers before it; what is not listed is a loss, or beside them.
LAYERS = (
    ("_checks",),
    ("_ranking",),
    ("_rows",),
    ("functional", "_module", "_options", "diagnostics"),
    ("_state",),
    ("_loss",),
    ("_schedule",),
)
LOSSES, TOP = len(LAYERS), len(LAYERS) + 1


def layer(module: str) -> int:
    """Of a first-level module of the package; "" is the package itself."""
    if module == "":
        return TOP
    return next((level for level, names in enumerate(LAYERS) if module in names), LOSSES)


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, at any depth; `from a import b` gives a.b."""
    return imported_by(ast.walk(ast.parse(path.read_text())))


def at_import(path: Path) -> set[str]:
    """The same of what a file imports when it is imported itself."""
    return imported_by(ast.parse(path.read_text()).body)


def imported_by(nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def first_level(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__init__", "")


def module_name(path: Path) -> str:
    parts = ("imbalanced_losses", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


@EACH_FILE
def test_imports_point_down(path: Path) -> None:
    own = first_level(path)
    for name in imports(path):
        package, _, rest = name.partition(".")
        imported = rest.partition(".")[0]
        if package != "imbalanced_losses" or imported == own:
            continue
        assert layer(imported) < layer(own), f"{own or '__init__'} imports {imported}"


def test_imports_have_no_cycle() -> None:
    """Of the package as a whole, so that each file can be read after those that it imports."""
    modules = {module_name(path): path for path in FILES}
    imported = {
        name: {
            found
            for line in at_import(path)
            for found in (line, line.rpartition(".")[0])
            if found in modules and found != name and not name.startswith(f"{found}.")
        }
        for name, path in modules.items()
    }
    assert len(list(TopologicalSorter(imported).static_order())) == len(FILES)


def test_only_gather_knows_torch_distributed() -> None:
    known = {name for path, name in zip(FILES, NAMES, strict=True) if "distributed" in code(path)}
    assert known == {"_rows/gather.py"}


def code(path: Path) -> set[str]:
    """Attributes, imported names and bare names, without strings and comments."""
    words = {part for name in imports(path) for part in name.split(".")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, ast.Name):
            words.add(node.id)
    return words


def test_the_public_names() -> None:
    modules = {name for name, value in vars(imbalanced_losses).items() if inspect.ismodule(value)}
    names = {name for name in vars(imbalanced_losses) if not name.startswith("_")}
    assert set(imbalanced_losses.__all__) == names - modules | {"functional"}
    assert imbalanced_losses.SmoothAPLoss.__module__ == "imbalanced_losses.ap_loss"


def test_importing_the_package_imports_nothing_optional() -> None:
    """Whatever importing torch alone does not."""
    script = (
        "import sys, json, torch; before = set(sys.modules); import imbalanced_losses;"
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    brought = set(json.loads(run.stdout)) - set(sys.stdlib_module_names)
    assert brought == {"imbalanced_losses"}


def test_the_map_in_contributing_is_complete() -> None:
    """Every file of the package in its table once, and no other."""
    text = (PACKAGE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w/]+\.py)` \| \S", text, re.MULTILINE)
    assert sorted(listed) == NAMES


def test_the_layers_in_contributing_are_these() -> None:
    text = (PACKAGE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    stated = text.partition("Imports point down only: ")[2].replace("\n", " ").split("←")
    found = [tuple(names.replace("`", "").split()) for names in stated[: len(LAYERS)]]
    assert found == list(LAYERS)
