"""The lines that the regularizer logs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """The lines logged by the attachment that contain a text."""
    caplog.set_level(logging.INFO, logger="sorsa_plugin")
    return lambda text: [r.getMessage() for r in caplog.records if text in r.getMessage()]
