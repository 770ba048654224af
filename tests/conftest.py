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

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import peft
import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import sorsa_plugin  # noqa: F401  (registers SORSA with PEFT)

torch.set_num_threads(1)


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama with all seven projections, tall, wide and square."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def token_batches(count: int, length: int = 9, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Language-modelling examples of random tokens, for a Trainer."""
    ids = torch.randint(1, 64, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two rows of random tokens for `tiny_llama`."""
    return torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(7))


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
