"""Writes SORSA's section of an adapter's model card: what it is, how to load it with and without this package."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData, metadata_load
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from yaml import YAMLError

from .rank_zero import say

CARD = "README.md"
HEADING = "## SORSA adapter"

SECTION = """{heading}

{lora}This adapter was trained with SORSA ([arXiv 2409.00055](https://arxiv.org/abs/2409.00055)): the top singular
triplets U, S, V of each adapted weight are trained beside the frozen residual, with an orthonormal regularizer
(gamma {gamma:g}, {update}). Rank {rank}; base model `{base}`.{storage}

{code}

As files that need no package of ours: `sorsa export-lora DIRECTORY --beside` writes an ordinary LoRA of twice the rank
into the folder `lora`, exactly, which PEFT, vLLM, TGI and llama.cpp load; `sorsa merge --base "{base}"
--adapter DIRECTORY -o merged` writes a plain model with the adapter merged in.

```bibtex
@article{{cao2024sorsa,
  title   = {{SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models}},
  author  = {{Cao, Yang}},
  journal = {{arXiv preprint arXiv:2409.00055}},
  year    = {{2024}}
}}
```
"""

LORA = "lora"
"""The folder of an adapter's directory that holds the same adapter as a LoRA."""

WITH_LORA = """PEFT alone loads {this}, without sorsa-plugin:
`PeftModel.from_pretrained(base, "{adapter}", subfolder="{folder}")`, on the base model `{base}`.

"""

CODE = """```python
# pip install sorsa-plugin
from peft import PeftModel
{imports}

base = {make_base}
model = PeftModel.from_pretrained(base, "{adapter}"{subfolder}){which}
{use}```"""

GENERATE = """
tokenizer = AutoTokenizer.from_pretrained("{base}")
prompt = tokenizer("The best thing about", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))
"""

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""{PEFT's task type: the class of transformers that loads its base models}"""

TO_FILL_IN = "Use the code below to get started with the model.\n\n[More Information Needed]"
"""The part of PEFT's card that is for code."""

UNNAMED = "[None](https://huggingface.co/None)"
"""What TRL's card calls a base model that is no model of the hub."""

QUICK_START = re.compile(r"(?<=^## Quick start\n).*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
"""The part of TRL's card that has code, which names the model "None" if it is not on the hub."""

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")

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
    task_type: str | None = None
    """PEFT's task type."""
    base_class: tuple[str, str] | None = None
    """Module and name of the base model's class; None where the task type says enough."""

    @property
    def base_name(self) -> str:
        """The base model for readers: its id on the hub, or the last part of a local path."""
        return public_name(self.base) or "the base model"


def public_name(base: str | None) -> str | None:
    """The id on the hub of a model or of data; for a local path its last part, which says nothing about a machine."""
    if base is None or not _is_local(base):
        return base
    cached = CACHED.search(base)
    return "/".join(cached.groups()) if cached else Path(base).name


def _is_local(base: str) -> bool:
    return HUB_ID.fullmatch(base) is None or Path(base).is_dir()


def complete_saved_card(directory: str | PathLike[str], values: CardValues) -> None:
    """Complete the card that PEFT has written with an adapter in `directory`.

    PEFT puts an adapter that is not called "default" into a folder of its own, and the card beside that folder.
    """
    own = Path(directory).absolute()
    if _front_matter(own / CARD).get("library_name") == "peft":
        complete_model_card(own, values)
    else:
        complete_model_card(own.parent, values, folder=own.name)


def complete_model_card(
    directory: str | PathLike[str], values: CardValues, *, adapter: str | None = None, folder: str = ""
) -> None:
    """Complete the card of an adapter, whoever wrote it.

    SORSA's section stands above all others, in place of an earlier one. Code that is missing or cannot run is filled
    in, local paths are taken out, and the tag, which PEFT drops, is put back. If the card cannot be completed, that is
    logged and nothing is raised, because weights are often still to be saved.

    Args:
        directory: where the card is.
        values: what it says.
        adapter: the adapter's id on the hub, if it is known.
        folder: of the adapter in that directory, if it has one.
    """
    path = Path(directory) / CARD
    if not path.is_file():
        return
    try:
        _complete(path, values, adapter or ".", folder)
    except Exception as error:
        say("%s stays without SORSA's section (%r).", path, error)


def _complete(path: Path, values: CardValues, adapter: str, folder: str) -> None:
    card = ModelCard.load(path)
    code = _code(values, adapter, folder)
    lora = _lora_lines(path.parent, values, adapter, folder)
    section = SECTION.format(
        heading=HEADING,
        lora=lora,
        gamma=values.gamma,
        update=values.update,
        rank=values.rank,
        base=values.base_name,
        storage=_residual(values),
        code=code,
    )
    text = _with_code(_without_paths(_without_section(card.text), values), code)
    above, heading, below = text.partition("\n## ")
    card.text = f"{above.rstrip()}\n\n{section}{heading}{below}"
    tags = _front_matter(path).get("tags") or []  # from the file: ModelCardData may split a word into letters
    kept = {tag for tag in ([tags] if isinstance(tags, str) else tags) if not _names_a_path(tag)}
    card.data.tags = sorted({*kept, "sorsa"})
    if isinstance(card.data.base_model, str) and _is_local(card.data.base_model):
        card.data.base_model = None
    card.save(path)


def _without_section(text: str) -> str:
    above, heading, rest = text.partition(HEADING)
    return above.rstrip() + "\n" + "".join(rest.partition("\n## ")[1:]) if heading else text


def _without_paths(text: str, values: CardValues) -> str:
    text = text.replace(UNNAMED, f"`{values.base_name}`")
    if values.base is None or not _is_local(values.base):
        return text
    text = text.replace(f"[{values.base}](https://huggingface.co/{values.base})", f"`{values.base_name}`")
    return text.replace(values.base, values.base_name) if "/" in values.base else text


def _names_a_path(tag: str) -> bool:
    name = tag.removeprefix("base_model:").removeprefix("adapter:")
    return tag.startswith("base_model:") and _is_local(name)


def _with_code(text: str, code: str) -> str:
    text = text.replace(TO_FILL_IN, TO_FILL_IN.replace("[More Information Needed]", code))
    found = QUICK_START.search(text)
    if found is not None and 'model="None"' in found.group():
        text = f"{text[: found.start()]}\n{code}\n\n{text[found.end() :]}"
    return text


def _code(values: CardValues, adapter: str, folder: str) -> str:
    """Code that loads the adapter, and lets a causal language model write something."""
    loader = AUTO_CLASSES.get(values.task_type or "")
    generates = values.task_type == "CAUSAL_LM"
    module = "transformers"
    if loader is None and values.base_class is not None:
        module, loader = values.base_class
        module = "transformers" if module.startswith("transformers.") else module
    loader = loader or "AutoModel"
    return CODE.format(
        imports=f"from {module} import {loader}{', AutoTokenizer' if generates else ''}",
        make_base=f'{loader}.from_pretrained("{values.base_name}")'
        if module == "transformers"
        else f"{loader}(...)  # with its pre-trained weights",
        adapter=adapter,
        subfolder=f', subfolder="{folder}"' if folder else "",
        which="  # this directory, or its id on the hub" if adapter == "." else "",
        use=GENERATE.format(base=values.base_name) if generates else "",
    )


def _lora_lines(directory: Path, values: CardValues, adapter: str, folder: str) -> str:
    """What loads the LoRA of an adapter's own directory; empty if there is none, or it is older than the adapter."""
    inside = f"{folder}/{LORA}" if folder else LORA
    try:
        content = (directory / inside / CARD).read_text(encoding="utf-8")
        made = (directory / inside / SAFETENSORS_WEIGHTS_NAME).stat().st_mtime_ns
        saved = (directory / folder / SAFETENSORS_WEIGHTS_NAME).stat().st_mtime_ns
    except OSError:
        return ""
    if made < saved:
        return ""
    return WITH_LORA.format(
        this="a truncated LoRA of this adapter" if "truncated" in content else "exactly this adapter, as a LoRA",
        adapter=adapter,
        folder=inside,
        base=public_name(values.full_precision_base) or values.base_name,
    )


def _residual(values: CardValues) -> str:
    if values.residual_storage is None:
        return ""
    full = f" (`{public_name(values.full_precision_base)}`)" if values.full_precision_base else ""
    return RESIDUAL.format(storage=values.residual_storage, full=full)


def _front_matter(path: Path) -> dict[str, Any]:
    """The metadata at the top of a card as they are written; empty if there is no readable card."""
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):
        return {}


def write_merged_card(base: Path, directory: Path, merged: Sequence[CardValues]) -> None:
    """Write the card of a model that adapters were merged into, with the licence and languages of the base's card."""
    base_id = merged[0].base
    name = base_id if base_id and not _is_local(base_id) else None
    known = _front_matter(base / CARD)
    kept = {key: known[key] for key in ("license", "license_name", "license_link", "language") if key in known}
    data = ModelCardData(**kept, base_model=name, library_name="transformers", tags=["sorsa"])
    adapters = ", and ".join(f"a SORSA adapter of rank {values.rank}" for values in merged)
    text = MERGED.format(base=merged[0].base_name, adapters=adapters)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(directory / CARD)
