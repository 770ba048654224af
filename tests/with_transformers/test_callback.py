"""SORSACallback: where its metrics go, what they are, and when it refuses."""

from __future__ import annotations

import ast
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders.llama import tiny_llama
from builders.trainer_runs import adapted, attachment_of, make_trainer, trained_values
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from sorsa_plugin import SORSAConfig, gaps
from sorsa_plugin.errors import AttachError, NoAdaptedLayersError, NonFiniteGradientError
from sorsa_plugin.regularizer.nonfinite_gradients import Found, GradientWatch, Norms
from sorsa_quickstart.answering import load_base
from sorsa_quickstart.task import train_examples
from sorsa_transformers import SORSACallback
from sorsa_transformers.metrics import SORSAMetrics

METRICS = {"sorsa/gap_mean", "sorsa/gap_max", "sorsa/reg_loss", "sorsa/gamma"}
GAMMA, LR = 1e-3, 1e-4


def losses(trainer: Trainer) -> list[dict[str, float]]:
    """The Trainer's own training entries, without the clock."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def metrics(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if METRICS & entry.keys()]


HOW = {
    "nothing passed": lambda trainer: None,
    "callback": lambda trainer: trainer.add_callback(SORSACallback()),
    "callback with trainer": lambda trainer: trainer.add_callback(SORSACallback(trainer)),
}


@pytest.mark.parametrize("prepare", HOW.values(), ids=HOW)
def test_metrics_are_part_of_the_log_line_and_of_the_history(
    prepare: Callable[[Trainer], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(adapted(gamma=GAMMA), tmp_path, learning_rate=LR)
    prepare(trainer)
    trainer.train()
    lines = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{'loss'")]
    assert len(lines) == len(losses(trainer)) == 4
    for line in lines:
        assert line.keys() >= METRICS
        assert {"grad_norm", "learning_rate"} <= line.keys()
    assert metrics(trainer) == losses(trainer)


def test_callbacks_see_the_metrics_in_training_logs_alone(tmp_path: Path) -> None:
    seen = []

    class Listener(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            seen.append(dict(logs))

    make_trainer(
        adapted(gamma=GAMMA), tmp_path, callbacks=[Listener(), SORSACallback()], eval_strategy="steps", eval_steps=2
    ).train()
    assert [logs.keys() >= METRICS for logs in seen if "loss" in logs] == [True] * 4
    assert not any(METRICS & logs.keys() for logs in seen if "loss" not in logs), "evaluation logs are not ours"


def test_metrics_can_be_switched_off(tmp_path: Path) -> None:
    for callbacks, taken_out in (([SORSACallback(log=False)], False), ([], True)):
        trainer = make_trainer(adapted(gamma=GAMMA), tmp_path, callbacks=callbacks)
        if taken_out:
            trainer.remove_callback(SORSAMetrics)
        trainer.train()
        assert len(losses(trainer)) == 4
        assert not metrics(trainer)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"logging_steps": 1}, [1, 2, 3, 4]),
        ({"logging_steps": 2}, [2, 4]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3]),
        ({"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, [4, 8]),
        ({"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1}, [2, 4]),
    ],
)
def test_every_training_log_has_metrics_and_training_is_the_same_without_them(
    options: dict, steps: list[int], tmp_path: Path
) -> None:
    without = make_trainer(adapted(gamma=GAMMA), tmp_path, examples=8, learning_rate=LR, **options)
    without.remove_callback(SORSAMetrics)
    without.train()
    trainer = make_trainer(adapted(gamma=GAMMA), tmp_path, examples=8, learning_rate=LR, **options)
    trainer.train()
    assert [entry["step"] for entry in metrics(trainer)] == steps
    assert all(entry.keys() >= METRICS for entry in metrics(trainer))
    rest = [{name: value for name, value in entry.items() if name not in METRICS} for entry in losses(trainer)]
    assert rest == losses(without)
    ours, theirs = trained_values(trainer.model), trained_values(without.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def sft_trainer(directory: Path) -> Trainer:
    trl = pytest.importorskip("trl")
    base, tokenizer = load_base()
    options = {"bf16": False, "use_cpu": True, "max_steps": 4, "logging_steps": 1, "report_to": "tensorboard"}
    return trl.SFTTrainer(
        base,
        args=trl.SFTConfig(str(directory), per_device_train_batch_size=2, save_strategy="no", **options),
        train_dataset=Dataset.from_list(train_examples(8)),
        processing_class=tokenizer,
        peft_config=SORSAConfig(r=2, target_modules=["q_proj"], gamma=GAMMA, task_type="CAUSAL_LM"),
    )


def hf_trainer(directory: Path) -> Trainer:
    return make_trainer(adapted(gamma=GAMMA), directory, learning_rate=LR, report_to="tensorboard")


@pytest.mark.parametrize("make", [hf_trainer, sft_trainer])
@pytest.mark.parametrize("prepare", HOW.values(), ids=HOW)
def test_metrics_reach_tensorboard(
    prepare: Callable[[Trainer], None],
    make: Callable[[Path], Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make(tmp_path)
    prepare(trainer)
    trainer.train()
    (directory,) = {path.parent for path in (tmp_path / "events").rglob("events.out*")}
    events = accumulator.EventAccumulator(str(directory)).Reload()
    for name in METRICS:
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        expected = [(entry["step"], entry[name]) for entry in metrics(trainer)]
        assert [step for step, _ in found] == [1, 2, 3, 4]
        for (_, value), (_, logged) in zip(found, expected, strict=True):
            assert value == pytest.approx(logged, rel=2.0**-23)  # event files hold fp32
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_a_trainer_imported_after_the_adapter_was_made_logs_the_metrics_too() -> None:
    """And neither the package nor an adapter imports it."""
    code = """
import sys, torch
from peft import get_peft_model
from sorsa_plugin import SORSAConfig
get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), SORSAConfig(r=2, target_modules=["0"]))
assert "transformers.trainer" not in sys.modules
from importlib.util import find_spec
assert find_spec("transformers.trainer")  # to look for it is not to import it
from transformers import Trainer
from transformers.trainer import DEFAULT_CALLBACKS
assert not any(type(finder).__module__ == "sorsa_transformers.default_callbacks" for finder in sys.meta_path)
print([callback.__name__ for callback in DEFAULT_CALLBACKS])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = "['DefaultFlowCallback', 'SORSAMetrics', 'SORSATrainerMethods']"
    assert done.stdout.splitlines()[-1:] == [expected], done.stderr[-3000:]


@pytest.mark.parametrize(
    ("update", "schedule", "follows"),
    [("coupled", None, True), ("decoupled", "lr", True), ("decoupled", "constant", False)],
)
def test_metrics_are_those_of_the_step_just_made(
    update: str, schedule: str | None, follows: bool, tmp_path: Path
) -> None:
    """Gaps in fp32 of the same tensors, so equal up to the order of one mean: 28 roundings of 6e-8."""
    model = adapted(gamma=GAMMA, reg_update=update, reg_schedule=schedule)
    trainer = make_trainer(model, tmp_path, learning_rate=LR)
    trainer.add_callback(SORSACallback(trainer))
    trainer.train()
    values = list(gaps(model).values())
    last, rate = metrics(trainer)[-1], losses(trainer)[-1]["learning_rate"]
    assert 0 < rate < LR
    assert last["sorsa/gap_mean"] == pytest.approx(sum(values) / len(values), rel=2e-6)
    assert last["sorsa/gap_max"] == max(values)
    assert last["sorsa/gamma"] == pytest.approx(GAMMA * rate / LR if follows else GAMMA, rel=1e-12)
    penalty = sum(values) / len(values) if update == "coupled" else sum(gap**2 for gap in values) / 4
    assert last["sorsa/reg_loss"] == pytest.approx(GAMMA / LR * penalty, rel=2e-6)


@pytest.mark.parametrize("with_trainer", [True, False])
def test_gamma_overrides_the_adapters(with_trainer: bool, tmp_path: Path) -> None:
    results = []
    for configured, override in ((1e-2, None), (0.0, 1e-2)):
        model = adapted(gamma=configured)
        trainer = make_trainer(model, tmp_path)
        trainer.add_callback(SORSACallback(trainer if with_trainer else None, gamma=override))
        trainer.train()
        results.append(gaps(model))
    assert results[0] == results[1]


def hide(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer whose step() runs no hook, as one that steps inside backward() or in another process."""

    def quiet_step(self: torch.optim.Optimizer, closure: object = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(parameter.grad, alpha=group["lr"])

    optimizer.step = types.MethodType(quiet_step, optimizer)
    return optimizer


def test_optimizer_that_never_runs_the_hook_is_an_error_at_the_first_step(tmp_path: Path) -> None:
    model = adapted(gamma=GAMMA)
    optimizer = hide(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR))
    trainer = make_trainer(model, tmp_path, callbacks=[SORSACallback()], optimizers=(optimizer, None))
    with pytest.raises(AttachError, match="A training step ended and SGD never called the regularizer's hook"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_an_optimizer_that_leaves_s_out_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    model = adapted(gamma=GAMMA)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]  # as Axolotl's Muon takes them
    optimizer = torch.optim.SGD(matrices, lr=LR)
    trainer = make_trainer(model, tmp_path, callbacks=[SORSACallback()], optimizers=(optimizer, None))
    with pytest.raises(AttachError, match=r"SGD steps U, V of .*\.default and not S, which would stay as it is"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_hidden_optimizer_trains_with_gamma_zero_as_the_error_advises(tmp_path: Path) -> None:
    model = adapted(gamma=0.0)
    optimizer = hide(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR))
    trainer = make_trainer(model, tmp_path, callbacks=[SORSACallback()], optimizers=(optimizer, None))
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_bad_gradient_of_the_last_step_is_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, which is simulated here, the norms of a step are read when the next one begins."""

    def note(watch: GradientWatch, step: int, optimizer: object, found: Found) -> None:
        watch.settle()
        on_its_way = types.SimpleNamespace(synchronize=lambda: None)
        values = torch.tensor([float("nan") if step == 4 else 1.0])
        watch._pending.append(Norms(step, [found.adapters[0].tensors.dS], values, on_its_way, found))

    monkeypatch.setattr(GradientWatch, "note", note)
    trainer = make_trainer(adapted(gamma=GAMMA), tmp_path, callbacks=[SORSACallback()])
    with pytest.raises(NonFiniteGradientError, match=r"in optimizer step 4, the first of them .*\.default\.S;"):
        trainer.train()


def test_model_without_an_adapter_is_an_error_when_training_begins(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama(layers=1), tmp_path, callbacks=[SORSACallback()])
    with pytest.raises(NoAdaptedLayersError, match="no active, trainable SORSA adapter"):
        trainer.train()


def test_training_again_goes_on_with_the_regularizer_once_a_step(tmp_path: Path) -> None:
    """The Trainer keeps its optimizer for a second train()."""
    trainer = make_trainer(adapted(gamma=GAMMA), tmp_path, callbacks=[SORSACallback()])
    trainer.train()
    trainer.train()
    assert attachment_of(trainer).steps == 8
