"""Models and adapters on disk that commands are given."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.llama import tiny_llama
from builders.saved import everything, saved_adapter, saved_base

from sorsa_plugin import init_adapter


@pytest.fixture(scope="session")
def llama_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def whole(llama_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter that `init_adapter` writes where nothing interrupts it."""
    directory = tmp_path_factory.mktemp("whole") / "adapter"
    init_adapter(llama_files, directory, everything(), progress=False)
    return directory


@pytest.fixture(scope="session")
def sharded_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(tmp_path_factory.mktemp("adapter"))
