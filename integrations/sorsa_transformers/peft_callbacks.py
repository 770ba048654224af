"""The calls that EVA and AdaLoRA need during training. Without them PEFT trains another method than was asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sorsa_plugin.errors import AdapterOptionsError
from sorsa_plugin.extend import innermost, say

from .trainer_compat import initialize_lora_eva_weights


class EvaCallback(TrainerCallback):
    """Initialises EVA (arXiv 2410.07170) from the first training batches, before the first step.

    EVA may change the ranks of layers. The optimizer exists by then and gets the new parameters. On a resumed run the
    checkpoint holds them already.

    Raises (when training begins):
        AdapterOptionsError: the ranks changed under several processes, whose wrappers hold the old parameters.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Initialise EVA, unless the run is resumed.

        Raises:
            AdapterOptionsError: see the class.
        """
        if state.global_step > 0:
            return
        peft_model = unwrapped(model)
        before = dict(peft_model.named_parameters())
        training = peft_model.training
        peft_model.eval()
        initialize_lora_eva_weights(peft_model, train_dataloader, forward_fn=_forward, show_progress_bar=False)
        peft_model.train(training)
        after = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        if all(before.get(name) is parameter for name, parameter in after.items()):
            return
        if args.world_size > 1:
            raise AdapterOptionsError(
                "EVA redistributed the ranks, and under several processes their wrappers hold the old parameters. Set "
                "rho: 1.0 in the eva block, which keeps every rank, or train in one process."
            )
        _exchange(innermost(optimizer), {name: p for name, p in before.items() if p.requires_grad}, after)


class AdaLoraCallback(TrainerCallback):
    """Allocates AdaLoRA's rank budget after every optimizer step (arXiv 2303.10512).

    Args:
        total_step_unknown: whether the config's total_step is a placeholder, to be replaced by the trainer's number of
            steps.

    Raises (when training begins):
        AdapterOptionsError: tinit and tfinal leave no step for pruning.
    """

    def __init__(self, total_step_unknown: bool) -> None:
        self.total_step_unknown = total_step_unknown

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Set the number of steps, and check that some are left for pruning.

        Raises:
            AdapterOptionsError: see the class.
        """
        tuner = unwrapped(model).base_model
        config = tuner.peft_config[tuner.trainable_adapter_name]
        if self.total_step_unknown:
            config.total_step = state.max_steps
            tuner.rankallocator.set_total_step(state.max_steps)
        if config.tinit >= config.total_step - config.tfinal:
            raise AdapterOptionsError(
                f"AdaLoRA's tinit {config.tinit} and tfinal {config.tfinal} leave none of {config.total_step} steps "
                "for pruning; expected tinit < total_step - tfinal. Lower them in the adalora block, or train longer."
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Allocate the rank budget, as AdaLoRA asks for after every optimizer step."""
        unwrapped(model).base_model.update_and_allocate(state.global_step)


def unwrapped(model: Any) -> PeftModel:
    """The PEFT model inside a Trainer's wrappers."""
    while not isinstance(model, PeftModel):
        model = model.module
    return model


def _forward(model: Any, batch: dict[str, Any]) -> Any:
    """The model's output for a batch, without the entries that its forward does not take: trainers add some."""
    known = inspect.signature(model.get_base_model().forward).parameters
    device = next(model.parameters()).device
    return model(**{name: value.to(device) for name, value in batch.items() if name in known})


def _exchange(optimizer: torch.optim.Optimizer, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> None:
    """Replace parameters, by name, in an optimizer that has not stepped. A layer that lost its rank drops out."""
    names = {id(parameter): name for name, parameter in old.items()}

    def current(parameters: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for parameter in parameters:
            name = names.get(id(parameter))
            if name is None or name in new:
                yield parameter if name is None else new[name]

    for group in optimizer.param_groups:
        group["params"] = list(current(group["params"]))
    say("EVA initialised %d tensors from the training data and redistributed their ranks.", len(new))
