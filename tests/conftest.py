"""What every test relies on: no network, no telemetry, one thread, tiny models built from configs."""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
)
os.environ.pop("COLUMNS", None)  # tables are as wide as in a file, in pytest-xdist's workers too

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import peft
import pytest
import torch
import transformers
from builders.llama import tiny_llama
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import LlamaForCausalLM

import sorsa_plugin  # noqa: F401  (registers SORSA with PEFT)

torch.set_num_threads(1)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two rows of random tokens for `tiny_llama`."""
    return torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.fixture
def refused(record_property: Callable[[str, object], None]) -> Callable[..., AbstractContextManager[None]]:
    """`pytest.raises`, which also keeps the message with the test's result, for docs/support.md."""

    @contextmanager
    def raises(error: type[Exception], match: str) -> Iterator[None]:
        with pytest.raises(error, match=match) as caught:
            yield
        record_property("refused", str(caught.value))

    return raises


@pytest.fixture(autouse=True, scope="session")
def _versions(record_testsuite_property: Callable[[str, object], None]) -> None:
    """Versions in the file of --junit-xml, for docs/support.md."""
    for package in (peft, torch, transformers):
        record_testsuite_property(package.__name__, package.__version__)
