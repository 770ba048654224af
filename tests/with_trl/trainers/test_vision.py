"""A model of images and text, for SORSA beside LoRA: SFT and DPO train its text layers or all of its layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.trl_runs import METHODS, adapter_config, build, logged
from builders.vision import image_rows, llava_and_processor
from peft import PeftModel

TEXT_ONLY = r".*language_model.*\.(q_proj|v_proj|down_proj)"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "targets"),
    [("SFT", "all-linear"), ("SFT", TEXT_ONLY), ("DPO", "all-linear")],
    ids=["SFT", "SFT of the text layers", "DPO"],
)
def test_a_model_of_images_trains_resumes_and_is_saved_exactly(
    kind: str, targets: str, method: str, tmp_path: Path
) -> None:
    model, processor = llava_and_processor()
    base = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    rows = image_rows(kind)

    def trainer_of(model: Any) -> Any:
        config = adapter_config(method, target_modules=targets)
        saving = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
        return build(kind, tmp_path, config, model=model, tokenizer=processor, rows=rows, **saving)

    trainer = trainer_of(model)
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    adapted = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any("vision_tower" in name for name in adapted) == (targets == "all-linear")

    resumed = trainer_of(copy.deepcopy(base))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    found = resumed.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in trainer.model.state_dict().items())

    loaded = PeftModel.from_pretrained(base, tmp_path / "checkpoint-3").eval()
    batch = processor(images=[row["images"] for row in rows], text=["<image> red"] * 4, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)
    restored = trainer.model.unload().state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in before.items())
