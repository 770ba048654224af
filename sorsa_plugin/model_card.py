"""Writes SORSA's section of an adapter's model card: what it is, how to load it with and without this package."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData, metadata_load
from yaml import YAMLError

from .rank_zero import say

CARD = "README.md"
HEADING = "## SORSA adapter"

SECTION = """{heading}

This adapter was trained with SORSA ([arXiv 2409.00055](https://arxiv.org/abs/2409.00055)): the top singular triplets
U, S, V of each adapted weight are trained beside the frozen residual, with an orthonormal regularizer
(gamma {gamma:g}, {update}). Rank {rank}; base model `{base}`.{storage}

PEFT knows the type only after the package is imported:

```python
import sorsa_plugin  # pip install sorsa-plugin
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/adapter")
```

Without the package: `sorsa export-lora path/to/this/adapter -o lora` writes it as an ordinary LoRA of twice the rank,
exactly, which PEFT, vLLM, TGI and llama.cpp load. A plain model, with the adapter merged in, is written by
`sorsa merge --base "{base}" --adapter path/to/this/adapter -o merged`.

```bibtex
@article{{cao2024sorsa,
  title   = {{SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models}},
  author  = {{Cao, Yang}},
  journal = {{arXiv preprint arXiv:2409.00055}},
  year    = {{2024}}
}}
```
"""

RESIDUAL = """ The base stores quantised residuals
({storage}): load it with that quantisation, or the full-precision model{full}."""


MERGED = """# Merged SORSA adapter

`{base}` with {adapters} ([arXiv 2409.00055](https://arxiv.org/abs/2409.00055)) merged into its
weights by `sorsa merge`: an ordinary model, which needs neither PEFT nor sorsa-plugin.
"""


class CardValues(NamedTuple):
    """What a card says about an adapter."""

    gamma: float
    update: str
    """coupled or decoupled."""
    rank: int
    base: str | None
    """Name of the base model."""
    residual_storage: str | None = None
    """How a base that stores residuals is quantised; None for any other base."""
    full_precision_base: str | None = None


def complete_saved_card(directory: str, values: CardValues) -> None:
    """Complete the card that PEFT has just written with an adapter in `directory`.

    PEFT puts an adapter that is not called "default" into a folder of its own, and the card beside that folder.
    """
    own = Path(directory).absolute()
    complete_model_card(own if _front_matter(own / CARD).get("library_name") == "peft" else own.parent, values)


def complete_model_card(directory: str | PathLike[str], values: CardValues) -> None:
    """Write SORSA's section into a directory's card, in place of an earlier one, and its tag, which PEFT drops.

    If the card cannot be completed, that is logged and nothing is raised, because weights are often still to be saved.
    """
    path = Path(directory) / CARD
    if not path.is_file():
        return
    try:
        _complete(path, values)
    except Exception as error:
        say("%s stays without SORSA's section (%r).", path, error)


def _complete(path: Path, values: CardValues) -> None:
    card = ModelCard.load(path)
    section = SECTION.format(
        heading=HEADING,
        gamma=values.gamma,
        update=values.update,
        rank=values.rank,
        base=values.base or "the base model",
        storage=_residual(values),
    )
    before, _, earlier = card.text.partition(HEADING)
    after = earlier.partition("\n## ")
    card.text = before.rstrip() + "\n\n" + section + ("".join(after[1:]) if after[1] else "")
    tags = _front_matter(path).get("tags") or []  # from the file: ModelCardData may split a word into letters
    card.data.tags = sorted({*([tags] if isinstance(tags, str) else tags), "sorsa"})
    card.save(path)


def _residual(values: CardValues) -> str:
    if values.residual_storage is None:
        return ""
    full = f" (`{values.full_precision_base}`)" if values.full_precision_base else ""
    return RESIDUAL.format(storage=values.residual_storage, full=full)


def _front_matter(path: Path) -> dict[str, Any]:
    """The metadata at the top of a card as they are written; empty if there is no readable card."""
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):
        return {}


def write_merged_card(base: Path, directory: Path, merged: Sequence[CardValues]) -> None:
    """Write the card of a model that adapters were merged into, with the licence and languages of the base's card."""
    name = merged[0].base
    known = _front_matter(base / CARD)
    kept = {key: known[key] for key in ("license", "license_name", "license_link", "language") if key in known}
    data = ModelCardData(**kept, base_model=name, library_name="transformers", tags=["sorsa"])
    adapters = ", and ".join(f"a SORSA adapter of rank {values.rank}" for values in merged)
    text = MERGED.format(base=name or "the base model", adapters=adapters)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(directory / CARD)
