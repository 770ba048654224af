"""The peak learning rate of a parameter group, to which the regularizer's rate is relative."""

from __future__ import annotations

from typing import Any

from ..errors import AttachError

ETA_MAX = "sorsa_eta_max"
"""Key of a parameter group: the peak learning rate, read once at attach; saved and resumed with the optimizer. Zero
where it is still to be read."""


def peak_rate(group: dict[str, Any], gamma: float) -> float:
    """The group's peak learning rate, read once: after a resume the schedule's start is no longer to be seen.

    Raises:
        AttachError: it is not positive, and gamma is.
    """
    if not group.get(ETA_MAX):
        group[ETA_MAX] = float(group.get("max_lr") or group.get("initial_lr") or group["lr"] or 0.0)
    if group[ETA_MAX] <= 0 and gamma > 0:
        raise AttachError(
            f"The peak learning rate of a parameter group with SORSA factors is {group[ETA_MAX]}; expected a positive "
            "one, because the regularizer's rate is gamma relative to it. Raise the learning rate (for Adafactor "
            "relative_step=False, scale_parameter=False, lr=...), freeze the adapter, or set gamma=0."
        )
    return group[ETA_MAX]
