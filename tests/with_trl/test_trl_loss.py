"""The loss wrapper: reports loss + penalty, trains exactly what the other routes train."""

from __future__ import annotations

import pytest
import torch
from builders.trl_runs import EXAMPLES, adapter_tensors, build, logged, sorsa_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer
from trl import SFTTrainer

from sorsa_plugin.errors import NoAdaptedLayersError
from sorsa_transformers import SORSACallback
from sorsa_trl import OrthonormalLoss, SORSADPOTrainer, SORSASFTTrainer, with_orthonormal_loss

WRAPPED = {"SFT": SORSASFTTrainer, "DPO": SORSADPOTrainer}


@pytest.mark.parametrize(
    ("kind", "accumulation", "update"),  # every two of the three meet
    [
        ("SFT", 1, "coupled"),
        ("SFT", 4, "decoupled"),
        ("DPO", 1, "decoupled"),
        ("DPO", 4, "coupled"),
    ],
)
def test_the_three_routes_train_the_same_weights(kind, accumulation, update, tmp_path):
    """Bit for bit; and the wrapper's penalty of a step is what the callback saw at the end of the step before."""
    changes = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2, "max_steps": 4}
    config = {"gamma": 0.01 if update == "coupled" else 0.1, "reg_update": update}
    alone = build(kind, tmp_path / "a", sorsa_config(**config), **changes)
    alone.train()
    called = build(kind, tmp_path / "b", sorsa_config(**config), **changes)
    called.add_callback(SORSACallback(called))
    called.train()
    wrapped = build(kind, tmp_path / "c", sorsa_config(**config), trainer_class=WRAPPED[kind], **changes)
    wrapped.train()
    expected = adapter_tensors(alone)
    for trainer in (called, wrapped):
        assert all(torch.equal(a, b) for a, b in zip(adapter_tensors(trainer), expected, strict=True))

    penalties = logged(wrapped, "sorsa/reg_loss")
    assert penalties[1:] == pytest.approx(logged(called, "sorsa/reg_loss")[:-1], rel=1e-5)  # fp32 norms, summed anew
    assert penalties[-1] > 1e-4
    # the sum of 4 micro-batches of fp32 losses near 8, each rounded once more by the share of the penalty
    tolerance = 4 * accumulation * 2**-24 * 16
    assert logged(wrapped, "sorsa/task_loss") == pytest.approx(logged(alone, "loss"), abs=tolerance)
    for loss, task, penalty in zip(logged(wrapped, "loss"), logged(wrapped, "sorsa/task_loss"), penalties, strict=True):
        assert loss == pytest.approx(task + penalty, abs=1e-12)
    assert wrapped.evaluate()["eval_loss"] == alone.evaluate()["eval_loss"]


def test_the_penalty_is_averaged_over_the_steps_of_a_report_and_over_a_short_last_window(tmp_path):
    """5 micro-batches at accumulation 4: one full step, one of a single micro-batch; one report over both."""
    changes = {
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "max_steps": -1,
    }
    every = build("SFT", tmp_path / "a", sorsa_config(), trainer_class=SORSASFTTrainer, rows=EXAMPLES[:10], **changes)
    every.train()
    once = build(
        "SFT",
        tmp_path / "b",
        sorsa_config(),
        trainer_class=SORSASFTTrainer,
        rows=EXAMPLES[:10],
        **changes | {"logging_steps": 4},
    )
    once.train()
    assert len(logged(every, "loss")) == 4
    for key in ("loss", "sorsa/reg_loss", "sorsa/task_loss"):
        (mean,) = logged(once, key)
        assert mean == pytest.approx(sum(logged(every, key)) / 4, rel=1e-6)
    assert min(logged(every, "sorsa/reg_loss")[1:]) > 0


def test_a_second_training_reports_no_penalty_of_the_first(tmp_path):
    """3 steps and a report every 2: the first training ends with a penalty that nobody reported."""
    changes = {"max_steps": 3, "logging_steps": 2}
    plain = build("SFT", tmp_path / "a", sorsa_config(), **changes)
    wrapped = build("SFT", tmp_path / "b", sorsa_config(), trainer_class=SORSASFTTrainer, **changes)
    for trainer in (plain, wrapped, plain, wrapped):
        trainer.train()
    assert len(logged(wrapped, "loss")) == 1, "the history is that of the second"
    # a mean of 2 fp32 losses near 8, each rounded once more by the penalty
    assert logged(wrapped, "sorsa/task_loss") == pytest.approx(logged(plain, "loss"), abs=2 * 2**-24 * 16)
    assert logged(wrapped, "sorsa/reg_loss")[0] > 1e-4


def test_loss_and_penalty_reach_the_event_file(tmp_path):
    trainer = build(
        "SFT", tmp_path, sorsa_config(), trainer_class=SORSASFTTrainer, report_to="tensorboard", max_steps=2
    )
    trainer.train()
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert files
    found: dict[str, list[float]] = {}
    for file in files:
        events = EventAccumulator(str(file)).Reload()
        found |= {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for key in ("loss", "sorsa/task_loss", "sorsa/reg_loss", "sorsa/gap_mean", "sorsa/gap_max", "sorsa/gamma"):
        assert found[f"train/{key}"] == pytest.approx(logged(trainer, key), rel=1e-6)


def test_a_callback_given_as_well_keeps_its_gamma_and_logs_nothing_twice(tmp_path):
    callback = SORSACallback(gamma=0.02)

    class WithCallback(SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, callbacks=[callback], **kwargs)

    trainer = build(
        "SFT", tmp_path, sorsa_config(gamma=0.5), trainer_class=with_orthonormal_loss(WithCallback), max_steps=2
    )
    trainer.train()
    assert sum(isinstance(c, SORSACallback) for c in trainer.callback_handler.callbacks) == 1
    assert trainer.regularizer.attachment.settings().gamma == 0.02
    assert len(logged(trainer, "sorsa/gap_mean")) == len(logged(trainer, "loss")) == 2


def test_a_callback_added_later_keeps_its_gamma_and_logs_nothing_twice(tmp_path):
    trainer = build("SFT", tmp_path, sorsa_config(gamma=0.5), trainer_class=SORSASFTTrainer, max_steps=2)
    callback = SORSACallback(trainer, gamma=0.02)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.attachment is trainer.regularizer.attachment
    assert callback.attachment.settings().gamma == 0.02
    assert len(logged(trainer, "sorsa/gap_mean")) == len(logged(trainer, "loss")) == 2


def test_gamma_zero_reports_the_plain_loss(tmp_path):
    free = build("SFT", tmp_path / "a", sorsa_config(gamma=0.0), trainer_class=SORSASFTTrainer)
    plain = build("SFT", tmp_path / "b", sorsa_config(gamma=0.0))
    free.train()
    plain.train()
    assert logged(free, "loss") == logged(plain, "loss")
    assert logged(free, "sorsa/reg_loss") == [0.0] * 3


def test_a_model_without_sorsa_is_refused_when_training_begins(tmp_path):
    trainer = build("SFT", tmp_path, None, trainer_class=SORSASFTTrainer)
    with pytest.raises(NoAdaptedLayersError, match="has no active, trainable SORSA adapter"):
        trainer.train()


def test_wrapping_is_idempotent_and_keeps_the_class():
    wrapped = with_orthonormal_loss(Trainer)
    assert issubclass(wrapped, Trainer)
    assert issubclass(wrapped, OrthonormalLoss)
    assert with_orthonormal_loss(wrapped) is wrapped
    assert wrapped.__name__ == "SORSATrainer"
