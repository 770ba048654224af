"""DDP and FSDP2 on a 4-bit base, intact and residual: two processes follow the trajectory of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders.engine_scenarios import CLASSES, FP32, adapter
from builders.llama import tiny_llama
from builders.processes import report, run

pytestmark = pytest.mark.distributed

KINDS = ["coupled", "residual"]
"""Scenarios of the worker: SORSA on the quantised weights, and on their quantised residuals."""


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama whose rows fit bitsandbytes' blocks of 64: its CPU kernels misread shorter ones."""
    directory = tmp_path_factory.mktemp("base")
    tiny_llama(hidden=64, intermediate=128).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def alone(saved_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    run("train_worker.py", 1, str(output), "single", *KINDS, "--quantised", saved_llama)
    return output


@pytest.mark.parametrize(("engine", "storage"), [("ddp", "float32"), ("fsdp2", "float32"), ("fsdp2", "bfloat16")])
def test_two_processes_on_four_bits_follow_the_trajectory_of_one(
    engine: str, storage: str, saved_llama: str, alone: Path, tmp_path: Path
) -> None:
    """With bf16 storage, as QLoRA's recipes for FSDP have it, the offsets stay fp32 beside it."""
    run("train_worker.py", 2, str(tmp_path), engine, *KINDS, "--quantised", saved_llama, "--storage", storage)
    for kind in KINDS:
        assert report(tmp_path)[kind]["engine"] == CLASSES[engine]
        # as in test_engines.py
        assert report(tmp_path)[kind]["losses"] == pytest.approx(report(alone)[kind]["losses"], abs=1e-5)
        expected, saved = adapter(alone / kind), adapter(tmp_path / kind)
        assert saved.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(
                saved[key], tensor, rtol=0, atol=FP32, msg=lambda text, key=key: f"{key}: {text}"
            )
