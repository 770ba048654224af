"""Imports point one way: the tables in docs/architecture.md are the rule, and the code keeps it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = "sorsa_plugin"
COMMANDS = "sorsa_cli"
"""The core's command line, a wing of its own outside the package."""
PUBLIC = (CORE, f"{CORE}.extend", f"{CORE}.errors")
FRAMEWORKS = ("peft", "transformers", "accelerate", "trl", "deepspeed", "axolotl", "llamafactory")
DOCUMENTED = {
    *FRAMEWORKS,
    *("peft.config", "peft.utils", "transformers.utils", "deepspeed.utils.zero_to_fp32"),
}
"""Modules of other packages whose names may be imported anywhere; all others are private API."""


@cache
def source_files(package: str) -> dict[str, Path]:
    """{module: file} of a package."""
    folder = ROOT / package if (ROOT / package).is_dir() else ROOT / "integrations" / package
    files = {}
    for path in folder.rglob("*.py"):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every module or name that a file imports, in functions and for types too, by its absolute name."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def modules_imported(source: str, module: str, is_package: bool, known: Iterable[str]) -> set[str]:
    """Those of the known modules that a file imports, or names out of."""
    known = set(known)
    found = set()
    for name in imported(source, module, is_package):
        longest = next((stem for stem in (name, name.rpartition(".")[0]) if stem in known), None)
        if longest is not None and longest != module:
            found.add(longest)
    return found


def wing_of(module: str) -> str:
    """The row of the table that a module of the core belongs to."""
    if module.split(".")[0] == COMMANDS:
        return COMMANDS
    parts = module.split(".")[1:]
    path = source_files(CORE)[module]
    if not parts:
        return "__init__"
    folders = parts if path.name == "__init__.py" else parts[:-1]
    return "/".join(folders) or parts[-1]


@cache
def imports_of_core() -> dict[str, set[str]]:
    """{module: modules of the core that it imports}; a package's own docstring file counts for nothing."""
    files = {**source_files(CORE), **source_files(COMMANDS)}
    real = {module for module, path in files.items() if path.name != "__init__.py" or module == CORE}
    return {
        module: modules_imported(path.read_text(), module, path.name == "__init__.py", real - {CORE})
        for module, path in files.items()
    }


def table(first_header: str) -> dict[str, list[str]]:
    """{wing: what it imports} of a table in docs/architecture.md, in its order."""
    text = (ROOT / "docs/architecture.md").read_text()
    rows = text[text.index(f"| {first_header} |") :].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0].strip("`"): re.findall(r"`([^`]+)`", row[2]) for row in cells}


def upward(edges: dict[str, set[str]], order: list[str]) -> list[str]:
    """Imports that do not point to an earlier wing in the order."""
    return [
        f"{wing} imports {other}"
        for wing, others in edges.items()
        for other in others
        if order.index(other) >= order.index(wing)
    ]


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(edges.get(start, ()))
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting.extend(edges.get(module, ()))
        return seen

    return [module for module in edges if module in reachable(module)]


def wings(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between wings."""
    found: dict[str, set[str]] = {}
    for module, others in edges.items():
        found.setdefault(wing_of(module), set()).update(wing_of(other) for other in others)
    return {wing: others - {wing} for wing, others in found.items()}


def test_every_import_of_the_core_is_in_the_table_and_points_down() -> None:
    rows = table("wing")
    found = wings(imports_of_core())
    assert set(found) == set(rows), "a wing without a row, or a row without a wing"
    assert upward(found, list(rows)) == []
    assert {wing: sorted(others) for wing, others in found.items()} == {wing: sorted(o) for wing, o in rows.items()}


def test_no_modules_of_the_core_import_each_other() -> None:
    assert circles(imports_of_core()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("sorsa_plugin.linalg.svd", "from ..layers.layer import SORSALayer"),
        ("sorsa_plugin.layers.layer", "def f():\n    from ..qsorsa import residual"),
        ("sorsa_plugin.config", "if TYPE_CHECKING:\n    import sorsa_plugin.tuner.model"),
        ("sorsa_plugin.layers.base", "from .kinds.linear import SORSALinear"),
    ],
)
def test_one_import_against_the_direction_is_found(module: str, line: str) -> None:
    edges = dict(imports_of_core())
    path = source_files(CORE)[module]
    edges[module] = modules_imported(f"{path.read_text()}\n{line}\n", module, False, edges)
    assert len(upward(wings(edges), list(table("wing")))) == 1
    assert circles(edges) != []


def test_integrations_import_public_names_alone_and_in_one_direction() -> None:
    rows = table("package")
    found: dict[str, set[str]] = {}
    for package in rows:
        for module, path in source_files(package).items():
            for name in imported(path.read_text(), module, path.name == "__init__.py"):
                top = name.split(".")[0]
                assert top != COMMANDS or name.removeprefix(f"{COMMANDS}.") in ("options", "formatting.size"), name
                assert top != CORE or name == CORE or name.rpartition(".")[0] in PUBLIC, f"{module} imports {name}"
                if top in rows and top != package:
                    found.setdefault(package, set()).add(top)
    assert {package: sorted(found.get(package, ())) for package in rows} == {
        package: sorted(others) for package, others in rows.items()
    }
    assert upward(found, list(rows)) == []


def test_examples_of_plug_ins_import_public_names_alone() -> None:
    for path in (ROOT / "examples/third_party_plugin").glob("*.py"):
        for name in imported(path.read_text(), path.stem, False):
            assert name.split(".")[0] != CORE or name.rpartition(".")[0] in PUBLIC, f"{path.name} imports {name}"


def test_private_names_of_other_packages_are_imported_in_compat_files_alone() -> None:
    for package in (CORE, COMMANDS, *table("package")):
        for module, path in source_files(package).items():
            if "compat" in path.stem or "compat" in path.parts:
                continue
            for name in imported(path.read_text(), module, path.name == "__init__.py"):
                home, _, last = name.rpartition(".")
                if home.split(".")[0] in FRAMEWORKS:
                    assert home in DOCUMENTED, f"{module} imports {name}"
                    assert not last.startswith("_"), f"{module} imports {name}"
