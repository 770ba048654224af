"""The tiny Llama on disk, and its initial adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.llama import tiny_llama
from builders.saved import everything

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
