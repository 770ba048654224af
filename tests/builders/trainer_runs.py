"""Short Trainer runs of the tiny Llama on the CPU, shared by the tests of sorsa_transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from builders.adapters import perturb
from builders.llama import tiny_llama, token_batches
from sorsa_plugin import SORSAConfig
from sorsa_plugin.regularizer.attach import attach
from sorsa_plugin.regularizer.optimizers import innermost
from sorsa_plugin.regularizer.step_hooks import Attachment


def adapted(scale: float = 0.3, layers: int = 1, **options: Any) -> PeftModel:
    """The tiny Llama with an adapter on every projection, its columns moved by about `scale`."""
    options.setdefault("gamma", 1e-4)
    model = get_peft_model(tiny_llama(layers=layers), SORSAConfig(r=4, target_modules="all-linear", **options))
    perturb(model, scale=scale)
    return model


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    """Four steps of two examples; no reports, checkpoints or progress bar unless asked for."""
    defaults = {
        "output_dir": str(directory / "run"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**defaults, **options})


def make_trainer(model: torch.nn.Module, directory: Path, *, examples: int = 64, **options: Any) -> Trainer:
    """A Trainer on random tokens; `callbacks`, `optimizers` and the like go to it, the rest to its arguments."""
    own = {name: options.pop(name) for name in ("callbacks", "optimizers", "compute_loss_func") if name in options}
    return Trainer(
        model,
        arguments(directory, **options),
        train_dataset=token_batches(examples),
        eval_dataset=token_batches(4, seed=1),
        **own,
    )


def attachment_of(trainer: Trainer) -> Attachment:
    """What is attached to a trainer's optimizer after training (attaching again returns the first)."""
    return attach(trainer.model, innermost(trainer.optimizer))


def trained_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
