"""SORSA's section of an adapter's model card: what it is, how to load it with and without this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard

if TYPE_CHECKING:
    from .config import SORSAConfig

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
exactly, which PEFT, vLLM, TGI and llama.cpp load. Or merge it once with `model.merge_and_unload()` and save the result,
a plain model.

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
({storage}): load it with that quantisation, or the full-precision model with the LoRA below."""


def complete_model_card(directory: str, config: SORSAConfig) -> None:
    """Write SORSA's section, in place of an earlier one, and its tag, which PEFT drops, into a directory's card."""
    path = Path(directory) / "README.md"
    if not path.exists():
        return
    card = ModelCard.load(path)
    section = SECTION.format(
        heading=HEADING,
        gamma=config.resolved_gamma,
        update=config.reg_update,
        rank=config.r,
        base=config.base_model_name_or_path or "the base model",
        storage=RESIDUAL.format(storage=config.base_storage) if config.residual_base else "",
    )
    before, _, own = card.text.partition(HEADING)
    after = own.partition("\n## ")
    card.text = before.rstrip() + "\n\n" + section + ("".join(after[1:]) if after[1] else "")
    card.data.tags = sorted({*(card.data.tags or []), "sorsa"})
    card.save(path)
