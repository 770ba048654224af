"""Starts a worker script in one or several processes, with a time-out, so that a hang fails instead of blocking."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ANNOUNCED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def environment() -> dict[str, str]:
    """This process's, less what a launcher announced in it; the helpers of all tests can be imported."""
    kept = {key: value for key, value in os.environ.items() if key not in ANNOUNCED}
    helpers = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    # where a process aborts, Python says in which line
    return kept | {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": helpers, "PYTHONFAULTHANDLER": "1"
    }  # fmt: skip


def start(script: str, processes: int, *options: str) -> subprocess.Popen[str]:
    """torchrun, or plain python without an engine; both streams are in `stdout`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*([sys.executable] if "single" in options else launcher), str(HERE / script), *options]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(script: str, processes: int, *options: str, timeout: float = 400, fails: bool = False) -> str:
    """What the processes printed; they have to succeed, or to fail where `fails` says so."""
    worker = start(script, processes, *options)
    try:
        printed, _ = worker.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        worker.terminate()  # not kill: torchrun has to take its processes along
        printed, _ = worker.communicate()
        pytest.fail(f"{script} went on for {timeout} s and was stopped. It had printed:\n{printed[-8000:]}")
    assert (worker.returncode != 0) == fails, printed[-8000:]
    return printed


def report(output: Path) -> dict:
    return json.loads((output / "report.json").read_text())
