"""FSDP2 and DeepSpeed as the recipes for large models ask for them, on two CPU processes: the training of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("axolotl")

from axolotl.utils.dict import DictDefault
from builders.axolotl_runs import ROOT, Run, assert_the_same_end, base_logits, plain_peft_logits, recipe, trained

from sorsa_axolotl.checkpoints import choose_checkpoint
from sorsa_plugin.errors import IncompleteAdapterError

pytestmark = pytest.mark.axolotl

TWO_PROCESSES = {"gradient_accumulation_steps": 1, "dataset_num_proc": 1}
"""Each takes every other batch of the single process's accumulated two."""


def sharded(**changes: Any) -> dict[str, Any]:
    example = yaml.safe_load((ROOT / "examples" / "axolotl" / "llama-70b-fsdp2.yaml").read_text())
    keys = {key: example[key] for key in ("fsdp_version", "fsdp_config")}
    return recipe(**keys, **TWO_PROCESSES, **changes)


@pytest.fixture(scope="module")
def sharded_run(sorsa_run: Run, runs: Path) -> Run:
    return trained(sharded(), runs / "sharded", processes=2)


def assert_trained_alike(run: Run, alone: Run) -> None:
    """That a run on two processes is the one on one process, but for the order of sums."""
    assert run.adapter.keys() == alone.adapter.keys()
    # Adam makes steps of full size where the gradient is rounding noise, which differs between orders of summation: a
    # per mille here; a regularizer counted twice, or half the rows lost, is some ten per cent
    for key in ("loss", "sorsa/gap_mean", "sorsa/reg_loss", "sorsa/gamma"):
        assert run.logged(key) == pytest.approx(alone.logged(key), rel=1e-2, abs=1e-6), key
    change = alone.logits - base_logits()
    assert (plain_peft_logits(run.output) - alone.logits).norm() < 0.05 * change.norm()


def test_two_processes_train_the_adapter_of_one(sorsa_run: Run, sharded_run: Run) -> None:
    assert_trained_alike(sharded_run, sorsa_run)


@pytest.mark.parametrize(("stage", "engine"), [(2, "ZeRO12"), (3, "ZeRO3")])
def test_deepspeed_trains_the_adapter_of_one_process(
    stage: int, engine: str, sorsa_run: Run, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = json.loads((ROOT / "examples" / "distributed" / f"zero{stage}.json").read_text())
    if stage == 3:  # else all of a small model is kept whole
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    written = runs / f"zero{stage}.json"
    written.write_text(json.dumps(config))
    monkeypatch.setenv("SORSA_TEST_REPORT", str(tmp_path))
    run = trained(recipe(deepspeed=str(written), **TWO_PROCESSES), runs / f"zero{stage}", processes=2)
    found = [json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in range(2)]
    assert [report["engine"] for report in found] == [engine] * 2
    assert all(report["factors_here"] < 0.6 * report["factors"] for report in found)
    assert_trained_alike(run, sorsa_run)


def test_a_sharded_run_resumes_bit_equal(sharded_run: Run, runs: Path) -> None:
    output = runs / "sharded_resumed"
    shutil.copytree(sharded_run.output / "checkpoint-4", output / "checkpoint-4")
    run = trained(sharded(auto_resume_from_checkpoints=True), output, processes=2)
    assert_the_same_end(run, sharded_run, start=4)


def test_resuming_from_a_sharded_checkpoint_that_is_read_in_part_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    cfg = DictDefault(
        output_dir=str(tmp_path),
        auto_resume_from_checkpoints=True,
        fsdp_config={"state_dict_type": "FULL_STATE_DICT"},
    )
    with pytest.raises(IncompleteAdapterError, match="was cut off"):
        choose_checkpoint(DictDefault(cfg))
    assert "Set state_dict_type: SHARDED_STATE_DICT and final_state_dict_type: FULL_STATE_DICT" in caplog.text
    (checkpoint / "trainer_state.json").write_text('{"global_step": 4}')
    choose_checkpoint(DictDefault(cfg))
    (checkpoint / "pytorch_model_fsdp.bin").touch()
    with pytest.raises(IncompleteAdapterError, match=f"lora_model_dir: {checkpoint}"):
        choose_checkpoint(DictDefault(cfg))
