"""`rl: dpo` and `rl: kto` with `adapter: sorsa`, where Axolotl's trainer makes the adapter from the config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("axolotl")

from builders.axolotl_runs import PREFERENCES, Run, axolotl, base_model, plain_peft_logits, recipe, trained

pytestmark = pytest.mark.axolotl

SHORT = {
    "rl_beta": 0.1,
    "max_steps": 2,
    "save_steps": 2,
    "warmup_steps": 1,
    "gradient_accumulation_steps": 1,
    "val_set_size": 0,
    "eval_steps": None,
    "remove_unused_columns": False,
}


def preferences(**kind: Any) -> dict[str, Any]:
    path, formats = kind.pop("path"), kind.pop("type")
    return recipe(**SHORT, **kind, datasets=[{"path": str(path), "ds_type": "json", "split": "train", "type": formats}])


def assert_a_directory_with_an_adapter_and_no_model(run: Run) -> None:
    names = {path.name for path in run.output.iterdir() if path.is_file()}
    weights = {name for name in names if name.endswith((".safetensors", ".bin", ".pt"))}
    assert weights == {"adapter_model.safetensors", "probe.safetensors"}
    assert all(".sorsa_factors." in name for name in run.adapter)
    torch.testing.assert_close(plain_peft_logits(run.output), run.logits, rtol=0, atol=0)
    changed = [name for name, tensor in run.adapter.items() if name.endswith(".dU") and bool(tensor.any())]
    assert len(changed) == 4 * 7  # every linear of the four layers was trained
    assert len(run.logged("sorsa/gap_mean")) == 2


def test_dpo_saves_an_adapter_that_merges(runs: Path) -> None:
    formats = {
        "field_prompt": "prompt",
        "field_chosen": "chosen",
        "field_rejected": "rejected",
        "prompt_format": "{prompt}",
        "chosen_format": "{chosen}",
        "rejected_format": "{rejected}",
    }
    changed = preferences(rl="dpo", path=PREFERENCES, type=formats)
    run = trained(changed, runs / "dpo")
    assert_a_directory_with_an_adapter_and_no_model(run)
    # policy and reference are the same model before the first step, whose loss is therefore ln 2
    assert run.logged("loss")[1] == pytest.approx(0.6931, abs=1e-3)

    merge = axolotl("merge-lora", changed, run.output)
    assert merge.returncode == 0, merge.log[-4000:]
    merged = load_file(run.output / "merged" / "model.safetensors")
    assert not torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"], base_model().model.layers[0].self_attn.q_proj.weight
    )


def test_kto_saves_an_adapter(runs: Path) -> None:
    rows = [json.loads(line) for line in PREFERENCES.read_text().splitlines()]
    data = runs / "kto.jsonl"
    with data.open("w") as file:
        for index, row in enumerate(rows):
            good = index % 2 == 0
            answer = row["chosen" if good else "rejected"]
            file.write(json.dumps({"prompt": row["prompt"], "completion": answer, "label": good}) + "\n")
    formats = {
        "field_prompt": "prompt",
        "field_completion": "completion",
        "field_label": "label",
        "prompt_format": "{prompt}",
        "completion_format": "{completion}",
    }
    run = trained(preferences(rl="kto", path=data, type=formats), runs / "kto")
    assert_a_directory_with_an_adapter_and_no_model(run)
