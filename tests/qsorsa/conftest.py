"""A tiny Llama on disk whose projections fit the blocks of every kind of quantisation."""

from __future__ import annotations

import pytest
from builders.quantised import save_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))
