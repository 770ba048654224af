"""Runs a worker script in several processes under torchrun's agent, or in one without, and returns what they printed.

The processes are forked from one that has imported the libraries already, which is most of the 13 seconds that a start
by command takes; what starts by command is tested in `test_launch_files.py`.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

TESTS = Path(__file__).parents[1]
HERE = TESTS / "distributed"
ANNOUNCED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
LIBRARIES = ["pytest", "deepspeed", "transformers.trainer", "peft", "accelerate", "trl.trainer.sft_trainer"]

multiprocessing.set_forkserver_preload(LIBRARIES)  # those that are not installed are passed over


def environment() -> dict[str, str]:
    """This process's, less what a launcher announced in it; the helpers of all tests can be imported."""
    kept = {key: value for key, value in os.environ.items() if key not in ANNOUNCED}
    helpers = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": helpers}


def run(script: str, processes: int, *options: str, timeout: float = 400, fails: bool = False) -> str:
    """What the processes printed; they have to succeed, or to fail where `fails` says so."""
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(logs, redirects=Std.ALL),
        )
        failed = "no"
        try:
            with mock.patch.dict(os.environ, environment(), clear=True), time_out(timeout):
                elastic_launch(config, _work)(str(HERE / script), options)
        except ChildFailedError:
            failed = "yes"
        except SignalException:
            failed = f"stopped after {timeout} s"
        printed = "".join(path.read_text() for path in sorted(Path(logs).rglob("std*.log")))
    assert failed == ("yes" if fails else "no"), f"{script}: {failed}\n{printed[-8000:]}"
    return printed


@contextmanager
def time_out(seconds: float) -> Iterator[None]:
    """Tell the agent to end its processes, as torchrun is told, so that a hang fails instead of blocking."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _work(script: str, options: tuple[str, ...]) -> None:
    """In a process of its own: what `python SCRIPT OPTIONS` does, without a launcher where an option is "single"."""
    faulthandler.enable()  # where a process aborts, Python says in which line
    if "single" in options:
        for name in [name for name in os.environ if name in ANNOUNCED or name.startswith(("MASTER_", "TORCHELASTIC"))]:
            del os.environ[name]
    sys.path[:0] = [str(Path(script).parent), str(TESTS)]
    sys.argv = [script, *options]
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        traceback.print_exc()  # here, where it is caught as printed
        raise


def report(output: Path) -> dict:
    return json.loads((output / "report.json").read_text())
