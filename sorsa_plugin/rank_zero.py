"""Logs one line for the user, from one process of a run."""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)


def say(message: str, *values: Any) -> None:
    """Log one line for the user, from the first process of a run alone.

    Args:
        message: format string, as for `logging`.
        values: its arguments.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()):
        logger.warning(message, *values)
