"""A hook of the site's build: a link out of docs/ leads to the file in the repository, and the file has to exist.

The same pages are read in the repository, where such links are relative.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).parents[2]
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)([^)]*)\)")

log = logging.getLogger("mkdocs.hooks.links")  # a warning ends a strict build


def repository() -> str:
    """The address in pyproject.toml, the one place that has it."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of one page."""

    def outside(match: re.Match[str]) -> str:
        if not (ROOT / match[1]).exists():
            log.warning("docs/%s links to ../%s, which does not exist", page.file.src_uri, match[1])
        return f"]({repository()}/tree/main/{match[1]}{match[2]})"

    return OUTSIDE.sub(outside, markdown)
