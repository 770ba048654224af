"""TRL's SFT and DPO trainers with the loss wrapper: every engine reports and trains what one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders.processes import report, run
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    run("trl_worker.py", 1, str(output), "single")
    return output


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_reports_and_trains_what_one_process_does(engine: str, alone: Path, tmp_path: Path) -> None:
    run("trl_worker.py", 2, str(tmp_path), engine)
    for kind, expected in report(alone).items():
        found = report(tmp_path)[kind]
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            # losses up to 11 of some hundred terms in another order; a few ulp of 11 (1e-6)
            assert found[name] == pytest.approx(values, abs=1e-5), (kind, name)
        reported = zip(found["loss"], found["sorsa/task_loss"], found["sorsa/reg_loss"])
        assert all(loss == pytest.approx(task + penalty, abs=2e-6) for loss, task, penalty in reported)
        assert min(found["sorsa/reg_loss"]) > 1
        adapters = [load_file(output / kind / "adapter" / "adapter_model.safetensors") for output in (tmp_path, alone)]
        assert adapters[0].keys() == adapters[1].keys()
        for key, tensor in adapters[1].items():
            # offsets below 0.3 in four steps, each rounded once; gradients of norm 1 at most, at a rate of 1e-2
            torch.testing.assert_close(
                adapters[0][key], tensor, rtol=0, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}"
            )
