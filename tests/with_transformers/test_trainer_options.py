"""Whatever the Trainer is told to do, the regularizer is visited once per optimizer step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders.trainer_runs import adapted, attachment_of, make_trainer, trained_values
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.trainer_utils import SchedulerType

from sorsa_plugin import gaps
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_plugin.regularizer.optimizers import ETA_MAX
from sorsa_transformers import SORSACallback

LR = 1e-4


def callbacks(explicit: bool) -> list[TrainerCallback]:
    return [SORSACallback()] if explicit else []


@pytest.mark.parametrize("explicit", [True, False], ids=["callback", "by-itself"])
@pytest.mark.parametrize("window", [1, 2, 4, 8])
def test_visited_once_per_optimizer_step_for_every_accumulation(window: int, explicit: bool, tmp_path: Path) -> None:
    """Eleven batches an epoch: for 2, 4 and 8 the last window of each epoch is short."""
    trainer = make_trainer(
        adapted(),
        tmp_path,
        examples=11,
        callbacks=callbacks(explicit),
        max_steps=-1,
        num_train_epochs=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=window,
    )
    trainer.train()
    assert trainer.state.global_step == 2 * -(-11 // window)
    assert attachment_of(trainer).steps == trainer.state.global_step


OPTIONS = {
    "no clipping": {"max_grad_norm": 0.0},
    "clipping": {"max_grad_norm": 1e-3},
    "bf16 autocast": {"bf16": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "reentrant gradient checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "fused AdamW": {"optim": "adamw_torch_fused"},
    "8-bit AdamW": {"optim": "adamw_bnb_8bit"},
    "Adafactor": {"optim": "adafactor"},
    "SGD": {"optim": "sgd"},
    "length grouping": {"train_sampling_strategy": "group_by_length"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_with_the_regularizer(name: str, tmp_path: Path) -> None:
    """Against the same run without it, gamma = lr pulls every mean gap down."""
    found = []
    for gamma in (0.0, LR):
        model = adapted(gamma=gamma)
        before = trained_values(model)
        trainer = make_trainer(model, tmp_path, learning_rate=LR, lr_scheduler_type="constant", **OPTIONS[name])
        trainer.train()
        assert attachment_of(trainer).steps == trainer.state.global_step == 4
        for parameter_name, value in trained_values(model).items():
            assert value.dtype == torch.float32, parameter_name
            assert not torch.equal(value, before[parameter_name]), f"{parameter_name} was not trained"
        found.append(sum(gaps(model).values()))
    assert found[1] < found[0]


SCHEDULE_ARGUMENTS = {
    SchedulerType.COSINE_WITH_MIN_LR: {"lr_scheduler_kwargs": {"min_lr": LR / 10}},
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: {"lr_scheduler_kwargs": {"min_lr": LR / 10}},
    SchedulerType.WARMUP_STABLE_DECAY: {"lr_scheduler_kwargs": {"num_decay_steps": 2}},
    SchedulerType.REDUCE_ON_PLATEAU: {"eval_strategy": "steps", "eval_steps": 1},
}
if hasattr(SchedulerType, "GREEDY"):
    SCHEDULE_ARGUMENTS[SchedulerType.GREEDY] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "lr_scheduler_kwargs": {"min_lr": LR / 10, "max_lr": LR},
    }


@pytest.mark.parametrize("explicit", [True, False], ids=["callback", "by-itself"])
@pytest.mark.parametrize("schedule", list(SchedulerType), ids=lambda schedule: schedule.value)
def test_every_scheduler_has_its_peak_and_its_visits(schedule: SchedulerType, explicit: bool, tmp_path: Path) -> None:
    trainer = make_trainer(
        adapted(),
        tmp_path,
        callbacks=callbacks(explicit),
        learning_rate=LR,
        lr_scheduler_type=schedule,
        warmup_steps=2,
        max_steps=5,
        **SCHEDULE_ARGUMENTS.get(schedule, {}),
    )
    trainer.train()
    attachment = attachment_of(trainer)
    assert attachment.steps == 5
    (group,) = [group for group in trainer.optimizer.param_groups if ETA_MAX in group]
    assert group[ETA_MAX] == LR
    last_rate = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry][-1]
    assert 0 <= attachment.eta <= LR
    assert attachment.eta == pytest.approx(last_rate, rel=1e-12) or schedule.value in ("reduce_lr_on_plateau", "greedy")


def test_evaluation_does_not_see_gamma(tmp_path: Path) -> None:
    losses = [
        make_trainer(adapted(gamma=gamma), tmp_path, callbacks=callbacks(True)).evaluate()["eval_loss"]
        for gamma in (0.0, 100.0)
    ]
    assert losses[0] == losses[1]


def test_evaluation_between_steps_is_not_a_visit(tmp_path: Path) -> None:
    trainer = make_trainer(adapted(), tmp_path, callbacks=callbacks(True), eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert attachment_of(trainer).steps == 4


def test_reported_training_loss_is_the_tasks(tmp_path: Path) -> None:
    """The first step's loss, before any update, with and without a large penalty."""
    losses = []
    for gamma in (0.0, 1.0):
        trainer = make_trainer(adapted(gamma=gamma), tmp_path, callbacks=callbacks(True), max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """A learning rate that does harm: the best of four checkpoints is the first."""
    model = adapted(gamma=1.0)
    trainer = make_trainer(
        model,
        tmp_path,
        callbacks=callbacks(True),
        learning_rate=0.3,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    seen = {}

    class Remember(TrainerCallback):
        def on_save(self, args, state, control, **kwargs) -> None:
            seen[state.global_step] = trained_values(model)

    trainer.add_callback(Remember())
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 4
    for name, value in trained_values(model).items():
        assert torch.equal(value, seen[best][name]), name
    assert attachment_of(trainer).steps == 4


@pytest.mark.parametrize("explicit", [True, False], ids=["callback", "by-itself"])
@pytest.mark.parametrize("when", ["before", "inside"])
def test_offsets_that_a_trainer_rounded_train_in_fp32(when: str, explicit: bool, tmp_path: Path) -> None:
    """TRL's quantised path casts trainable parameters to bf16 before Trainer.__init__ or in it."""
    model = adapted(scale=0.0)

    def cast() -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)

    if when == "before":
        cast()
    trainer = make_trainer(model, tmp_path, callbacks=callbacks(explicit), learning_rate=3e-5, max_steps=2)
    if when == "inside":
        cast()
    trainer.train()
    assert attachment_of(trainer).steps == 2
    for layer in sorsa_layers(model):
        factors = layer.factors("default")
        assert {t.dtype for t in (*factors.parameters(), *factors.buffers())} == {torch.float32}
        # with AdamW, entries have moved by about lr each step: 3e-5 and half of it, not by a multiple of a bf16 ulp
        assert 0 < float(factors.dU.detach().abs().max()) < 1e-4
    states = trainer.optimizer.state.values()
    assert {entry.dtype for state in states for entry in state.values()} == {torch.float32}


def test_adamw_with_state_of_8_bits(tmp_path: Path) -> None:
    """As `optim="adamw_bnb_8bit"`, with the threshold lowered: by default small tensors keep fp32 state."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = adapted()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=LR, weight_decay=0.0, min_8bit_size=1)
    before = sum(gaps(model).values())
    trainer = make_trainer(model, tmp_path, optimizers=(optimizer, None), lr_scheduler_type="constant")
    trainer.train()
    assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8}
    assert attachment_of(trainer).steps == 4
    assert sum(gaps(model).values()) < before


def layerwise(model: torch.nn.Module) -> LayerWiseDummyOptimizer:
    """As `optim="galore_adamw_layerwise"` does it: every parameter is stepped as soon as it has its gradient."""
    parts = {p: torch.optim.SGD([p], lr=LR) for p in model.parameters() if p.requires_grad}

    def step(parameter: torch.nn.Parameter) -> None:
        parts[parameter].step()
        parts[parameter].zero_grad()

    for parameter in parts:
        parameter.register_post_accumulate_grad_hook(step)
    return LayerWiseDummyOptimizer(parts)


@pytest.mark.parametrize("explicit", [True, False], ids=["callback", "by-itself"])
def test_an_optimizer_for_each_parameter_is_regularized_as_one_for_all(explicit: bool, tmp_path: Path) -> None:
    values = []
    for each in (False, True):
        model = adapted()
        optimizer = layerwise(model) if each else torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
        options = {"max_grad_norm": 0.0, "learning_rate": LR, "lr_scheduler_type": "constant"}
        for group in optimizer.param_groups:
            group["lr"] = LR
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        trainer = make_trainer(
            model, tmp_path, callbacks=callbacks(explicit), optimizers=(optimizer, schedule), **options
        )
        trainer.train()
        values.append(trained_values(model))
    for name, value in values[0].items():  # four steps, each rounded twice; batches of one have other roundings
        torch.testing.assert_close(values[1][name], value, rtol=0, atol=8 * 2**-23 * float(value.abs().max()))
    assert any(not torch.equal(value, trained_values(adapted())[name]) for name, value in values[0].items())
