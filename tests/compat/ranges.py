"""Prints the packages whose private API we use, as pip takes them: in pyproject.toml's ranges, or bare (--above)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

PACKAGES = ("peft", "transformers", "trl", "accelerate", "datasets")


def ranges(text: str) -> dict[str, str]:
    """{package: its range} in the text of a pyproject.toml; Python 3.10 has no reader of TOML."""
    found = re.findall(r'"([a-z]+)([<>=][^"\[]*)"', text)
    return {name: limits for name, limits in found if name in PACKAGES}


if __name__ == "__main__":
    known = ranges((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    above = "--above" in sys.argv
    print(" ".join(name if above else f'"{name}{known[name]}"' for name in PACKAGES))
