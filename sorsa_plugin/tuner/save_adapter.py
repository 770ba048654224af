"""Saves an adapter in another dtype than it trains in; `save_pretrained` itself keeps fp32."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import PeftModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save_adapter(
    model: PeftModel, directory: str | PathLike[str], *, adapter_name: str = "default", dtype: str = "float32"
) -> None:
    """Save one adapter with its factors stored as `dtype`; a 16-bit file is half as large.

    The offsets and the frozen factors are rounded alike, and the change is computed without cancellation. So the
    relative error of the change is that of the dtype (0.4% for bfloat16), whatever the size of the weights; float16
    loses offsets below 6e-5. Resume training from fp32 files.

    Args:
        model: a PEFT model.
        directory: the directory for the files of PEFT's `save_pretrained`.
        adapter_name: which adapter.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: the dtype is not one of these.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    state = {key: tensor.to(DTYPES[dtype]) if _is_factor(key) else tensor for key, tensor in model.state_dict().items()}
    model.save_pretrained(str(directory), selected_adapters=[adapter_name], state_dict=state)


def _is_factor(key: str) -> bool:
    """Whether a state-dict key is a factor. The fingerprint is not: it is compared to five digits and stays fp32."""
    return ".sorsa_factors." in key and not key.endswith(".fingerprint")
