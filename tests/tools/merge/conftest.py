"""A sharded base model and an adapter of it on disk; tests copy what they damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.saved import saved_adapter, saved_base


@pytest.fixture(scope="session")
def sharded_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(tmp_path_factory.mktemp("adapter"))
