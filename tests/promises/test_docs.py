"""The documentation is complete: every page is on the site, every error has its advice."""

from __future__ import annotations

import inspect
from pathlib import Path

import yaml

from sorsa_plugin import errors

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))


def listed(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in listed(part)]


def test_every_page_has_its_place_on_the_site() -> None:
    text = (DOCS.parent / "mkdocs.yml").read_text()
    nav = yaml.safe_load(text[text.index("\nnav:") :])["nav"]
    assert sorted(listed(nav)) == PAGES


def test_every_error_has_its_advice() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    classes = [name for name, kind in vars(errors).items() if inspect.isclass(kind) and name != "SORSAError"]
    assert [name for name in classes if f"| `{name}` |" not in page] == []
