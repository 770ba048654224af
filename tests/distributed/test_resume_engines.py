"""Checkpoints of every engine: resumed as if uninterrupted, on as many processes or another number; a killed one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from launching import report, run
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

CASES = [
    pytest.param("ddp", (), id="ddp"),
    pytest.param("fsdp2", ("--state-dict", "FULL_STATE_DICT", "--update", "decoupled"), id="fsdp2-full"),
    pytest.param("fsdp2", ("--state-dict", "SHARDED_STATE_DICT"), id="fsdp2-sharded"),
    pytest.param("zero2", ("--bf16",), id="zero2-bf16"),
    pytest.param("zero3", ("--update", "decoupled"), id="zero3"),
]


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def train(output: Path, processes: int, engine: str, *options: str) -> dict:
    run("resume_worker.py", processes, str(output), engine, *options)
    return report(output)


@pytest.mark.parametrize(("engine", "options"), CASES)
def test_a_resumed_run_goes_on_as_if_uninterrupted(engine: str, options: tuple[str, ...], tmp_path: Path) -> None:
    straight = train(tmp_path, 2, engine, *options)
    expected = tensors(tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    resumed = train(tmp_path, 2, engine, *options, "--resume")
    assert resumed["resumed_from"].endswith("checkpoint-3")
    assert resumed["losses"] == straight["losses"]
    found = tensors(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(
    ("engine", "options"),
    [("ddp", ()), ("fsdp2", ("--state-dict", "FULL_STATE_DICT")), ("fsdp2", ("--state-dict", "SHARDED_STATE_DICT"))],
    ids=["ddp", "fsdp2-full", "fsdp2-sharded"],
)
def test_a_run_resumes_on_another_number_of_processes(engine: str, options: tuple[str, ...], tmp_path: Path) -> None:
    straight = train(tmp_path, 2, engine, *options)
    expected = tensors(tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    resumed = train(tmp_path, 4, engine, *options, "--resume")
    assert resumed["resumed_from"].endswith("checkpoint-3")
    assert resumed["losses"] == pytest.approx(straight["losses"], abs=5e-6)
    found = tensors(tmp_path)
    for key, tensor in expected.items():  # three steps summed in another order; see test_engines.py
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_a_killed_process_ends_the_run_and_the_last_complete_checkpoint_resumes(tmp_path: Path) -> None:
    train(tmp_path / "straight", 2, "fsdp2")
    run("resume_worker.py", 2, str(tmp_path / "killed"), "fsdp2", "--die-at", "4", fails=True)
    torn = tmp_path / "killed" / "run" / "checkpoint-5"  # as if the process had died while saving, too
    shutil.copytree(tmp_path / "killed" / "run" / "checkpoint-3", torn)
    (torn / "trainer_state.json").unlink()
    resumed = train(tmp_path / "killed", 2, "fsdp2", "--resume")
    assert resumed["resumed_from"].endswith("checkpoint-3")
    expected, found = tensors(tmp_path / "straight"), tensors(tmp_path / "killed")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
