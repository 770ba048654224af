"""The documentation is complete and its code runs: every page is on the site, every error has its advice."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml
from builders.llama import tiny_llama, token_batches
from transformers import default_data_collator

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


@pytest.mark.parametrize("page", ["index.md", "trainer.md"])
def test_the_code_of_a_page_runs_in_its_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what a reader has already: a model, data and a collator."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"model": tiny_llama(), "data": token_batches(8), "collator": _collate}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page} block {number}", "exec"), names)


class _Batch(dict):
    def to(self, device: object) -> _Batch:
        return _Batch({name: tensor.to(device) for name, tensor in self.items()})


def _collate(rows: list[dict]) -> _Batch:
    return _Batch(default_data_collator(rows))
