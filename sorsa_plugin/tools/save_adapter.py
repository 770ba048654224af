"""Saves an adapter in another dtype than it trains in, or with its LoRA; `save_pretrained` itself does neither."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .lora_beside import export_beside

if TYPE_CHECKING:
    from peft import PeftModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save_adapter(
    model: PeftModel,
    directory: str | PathLike[str],
    *,
    adapter_name: str = "default",
    dtype: str = "float32",
    with_lora: bool = False,
) -> None:
    """Save one adapter with its factors stored as `dtype`, and, if asked, the exact LoRA of twice the rank beside it.

    A 16-bit file is half as large. The LoRA is for colleagues without this package:
    `PeftModel.from_pretrained(base, directory, subfolder="lora")`.

    The offsets and the frozen factors are rounded alike, and the change is computed without cancellation. So the
    relative error of the change is that of the dtype (0.4% for bfloat16), whatever the size of the weights; float16
    loses offsets below 6e-5. Resume training from fp32 files.

    Args:
        model: a PEFT model.
        directory: the directory for the files of PEFT's `save_pretrained`.
        adapter_name: which adapter.
        dtype: "float32", "bfloat16" or "float16".
        with_lora: write the adapter as a LoRA into the adapter's directory, under `lora`; see `lora_beside.py`.

    Raises:
        ValueError: the dtype is not one of these.
        UnsupportedLayerError: LoRA computes something else on an adapted layer; the adapter itself is saved.
        OutputExistsError: the folder `lora` holds something else; the adapter itself is saved.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    state = {key: tensor.to(DTYPES[dtype]) if _is_factor(key) else tensor for key, tensor in model.state_dict().items()}
    model.save_pretrained(str(directory), selected_adapters=[adapter_name], state_dict=state)
    if with_lora:
        own = Path(directory) if adapter_name == "default" else Path(directory, adapter_name)  # as PEFT saves
        export_beside(own)


def _is_factor(key: str) -> bool:
    """Whether a state-dict key is a factor. The fingerprint is not: it is compared to five digits and stays fp32."""
    return ".sorsa_factors." in key and not key.endswith(".fingerprint")
