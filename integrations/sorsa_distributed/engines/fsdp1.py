"""FSDP1 (`FullyShardedDataParallel`), which is refused.

It flattens a layer's frozen and trained factors into one tensor and cuts that anywhere, so no process holds matching
parts of both.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import FlatParameter

from sorsa_plugin.errors import AttachError
from sorsa_plugin.extend import Engine, Factor, innermost


def claim(factors: list[Factor], optimizer: Any) -> Engine | None:
    """None if the factors are not FSDP1's.

    Raises:
        AttachError: they are FSDP1's.
    """
    groups = getattr(innermost(optimizer), "param_groups", [])
    flat = any(isinstance(parameter, FlatParameter) for group in groups for parameter in group["params"])
    if flat or any(getattr(factor.offset, "_fsdp_flattened", False) for factor in factors):
        raise AttachError(
            "FSDP1 cuts SORSA's trained and frozen factors in different places, so the regularizer cannot be computed. "
            'Use FSDP2: `fsdp_version: 2` in accelerate\'s configuration, "version": 2 in fsdp_config.'
        )
    return None
