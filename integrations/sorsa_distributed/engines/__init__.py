"""Training engines that keep factors elsewhere than in whole parameters: one file, one class, one `claim` each."""

from __future__ import annotations

from typing import Any

from sorsa_plugin.extend import Engine, Factor

from . import deepspeed, fsdp1, fsdp2

CLAIMS = (fsdp2.claim, fsdp1.claim, deepspeed.claim)
"""Each says whether its engine holds these factors under this optimizer."""


def engine_of(factors: list[Factor], optimizer: Any) -> Engine | None:
    """The first engine that claims the factors."""
    return next((engine for claim in CLAIMS if (engine := claim(factors, optimizer)) is not None), None)
