"""The page of faults that others found names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = (TESTS / "promises" / "found_by_others.md").read_text()


def test_every_line_names_tests_that_exist() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and "**" not in line][2:]
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    missing = []
    for file, test in named:
        tree = ast.parse((TESTS / file).read_text())
        if test not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            missing.append(f"{file}::{test}")
    assert missing == []
    assert all("::" in line for line in lines)
    assert len(named) >= len(lines) > 30
