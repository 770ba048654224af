"""A folded model in the Trainer: it trains as the intact one does, evaluates, saves, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from builders.trainer_runs import adapted, make_trainer, trained_values
from transformers import Trainer

from sorsa_plugin.layers.layer import sorsa_layers

OPTIONS = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


def run(directory: Path, *, fold: bool = True, resume: str | None = None) -> Trainer:
    model = adapted(gamma=1e-3)
    if fold:
        model.fold()
    trainer = make_trainer(model, directory, **OPTIONS)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_folded_run_is_the_intact_run_up_to_rounding_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = run(tmp_path)
    folded = trained_values(whole.model)
    assert all(not layer.weight_state.is_whole for layer in sorsa_layers(whole.model))
    intact = run(tmp_path / "intact", fold=False)
    for one, other in zip(whole.state.log_history, intact.state.log_history, strict=True):
        for key in ("loss", "eval_loss"):  # losses near 4.6, each summed from fp32 terms that differ by 1e-6 or less
            assert abs(one.get(key, 0.0) - other.get(key, 0.0)) < 1e-4
    resumed = run(tmp_path, resume=str(tmp_path / "run" / "checkpoint-2"))
    again = trained_values(resumed.model)
    assert folded.keys() == again.keys()
    assert all(torch.equal(folded[name], again[name]) for name in folded)
