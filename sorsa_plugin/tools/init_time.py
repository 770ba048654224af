"""How long the factorisation of all adapted weights will take: measured here on random weights, or scaled."""

from __future__ import annotations

import time

import torch

from ..config import SORSAConfig
from ..linalg.svd import factorise, working_device
from .layer_groups import LayerGroup

TIMED_ELEMENTS = 2**22
"""A weight with more elements than this is timed on a smaller one: 2048 x 2048 takes a fraction of a second."""

UNIT_SIDE = 4096
"""Factorisation speed is given as seconds for one weight of this width and height."""


def estimate_init(groups: tuple[LayerGroup, ...], config: SORSAConfig, unit_seconds: float | None) -> tuple[float, str]:
    """Seconds to factorise all weights one after another, and a sentence on what that is based on.

    The time of one weight grows as out * in * r, the leading term of a block iteration.
    """
    if unit_seconds is not None:
        unit = UNIT_SIDE**2 * config.r
        total = sum(g.count * unit_seconds * g.shape[0] * g.shape[1] * g.rank / unit for g in groups)
        return total, f"given: {unit_seconds:g} s for one {UNIT_SIDE} x {UNIT_SIDE} weight at rank {config.r}"
    total, timed = 0.0, {}
    factorise(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), 4)  # the first call loads libraries
    for group in groups:
        case = (group.shape, group.rank)
        if case not in timed:
            timed[case] = _seconds(group, config)
        total += group.count * timed[case]
    device = working_device(torch.device("cpu"))
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    return total, (
        f"measured on this machine's {device.type}{threads}: one random weight of each shape, larger ones in part"
    )


def _seconds(group: LayerGroup, config: SORSAConfig) -> float:
    out, inner = group.shape
    # not so small that the rank would be a large part of it: then `factorise` takes another path
    shrink = min(1.0, max((TIMED_ELEMENTS / (out * inner)) ** 0.5, 4 * group.rank / min(out, inner)))
    shape = (max(1, round(out * shrink)), max(1, round(inner * shrink)))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    factorise(weight, group.rank, svd=config.svd, energy=config.resolved_svd_energy)
    elapsed = time.perf_counter() - started
    exponent = 3 if config.svd == "exact" else 2  # a full decomposition is cubic in the side that was shrunk
    return elapsed / shrink**exponent
