"""DDP and FSDP2 on a 4-bit base, intact and residual: two processes follow the trajectory of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_engines import adapter, run_worker
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama whose rows fit bitsandbytes' blocks of 64: its CPU kernels misread shorter ones."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    directory = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["intact", "residual"])
def test_two_processes_on_four_bits_follow_the_trajectory_of_one(
    kind: str, engine: str, base: str, tmp_path: Path
) -> None:
    options = ["--quantise", base, *(["--residual"] if kind == "residual" else [])]
    reference = run_worker(tmp_path / "one", 1, "single", *options)
    report = run_worker(tmp_path / "two", 2, engine, *options)
    assert ("FSDP" in report["distributed_type"]) == (engine == "fsdp2")
    # as in test_engines.py
    assert report["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    expected, saved = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert saved.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(saved[key], tensor, rtol=0, atol=5e-6, msg=lambda text, key=key: f"{key}: {text}")
