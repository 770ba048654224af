"""Training engines that do not keep factors as whole parameters: one file, one class, one `claim` each."""

from __future__ import annotations

from typing import Any

from sorsa_plugin.extend import Engine, Factor

from . import deepspeed, fsdp1, fsdp2

CLAIMS = (fsdp2.claim, fsdp1.claim, deepspeed.claim)
"""Each returns its engine if that holds these factors under this optimizer, else None."""


def engine_of(factors: list[Factor], optimizer: Any) -> Engine | None:
    """The first engine that claims the factors; None if none does.

    Raises:
        AttachError: the factors live under an engine that is not supported, or in a way that is not.
    """
    return next((engine for claim in CLAIMS if (engine := claim(factors, optimizer)) is not None), None)
