"""FSDP2 as the recipes for large models ask for it, on two CPU processes: the same training as one process's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("axolotl")

from axolotl.utils.dict import DictDefault
from axolotl_runs import ROOT, Run, assert_the_same_end, base_logits, plain_peft_logits, recipe, trained

from sorsa_axolotl.checkpoints import choose_checkpoint
from sorsa_plugin.errors import IncompleteAdapterError

pytestmark = pytest.mark.axolotl


def sharded(**changes: Any) -> dict[str, Any]:
    """The recipe on two processes, each of which takes every other batch of the single process's accumulated two."""
    example = yaml.safe_load((ROOT / "examples" / "axolotl" / "llama-70b-fsdp2.yaml").read_text())
    keys = {key: example[key] for key in ("fsdp_version", "fsdp_config")}
    return recipe(**keys, gradient_accumulation_steps=1, dataset_num_proc=1, **changes)


@pytest.fixture(scope="module")
def sharded_run(sorsa_run: Run, runs: Path) -> Run:
    return trained(sharded(), runs / "sharded", processes=2)


def test_two_processes_train_the_adapter_of_one(sorsa_run: Run, sharded_run: Run) -> None:
    assert sharded_run.adapter.keys() == sorsa_run.adapter.keys()
    # Adam makes steps of full size where the gradient is rounding noise, which differs between orders of summation: a
    # per mille here; a regularizer counted twice, or half the rows lost, is some ten per cent
    for key in ("loss", "sorsa/gap_mean", "sorsa/reg_loss", "sorsa/gamma"):
        assert sharded_run.logged(key) == pytest.approx(sorsa_run.logged(key), rel=1e-2, abs=1e-6), key
    change = sorsa_run.logits - base_logits()
    assert (plain_peft_logits(sharded_run.output) - sorsa_run.logits).norm() < 0.05 * change.norm()


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
    (checkpoint / "trainer_state.json").write_text("{}")
    choose_checkpoint(DictDefault(cfg))
    (checkpoint / "pytorch_model_fsdp.bin").touch()
    with pytest.raises(IncompleteAdapterError, match=f"lora_model_dir: {checkpoint}"):
        choose_checkpoint(DictDefault(cfg))
