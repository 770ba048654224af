"""Trains what a recipe says: `accelerate launch --module sorsa_trl.train sft --config recipe.yaml`.

The steps are those of TRL's own sft.py and dpo.py scripts, with three differences: the adapter is the one that
`adapter` names, instead of LoRA alone; the resolved recipe is written beside the checkpoints; and resuming takes the
last complete checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sorsa_plugin import setup_adapter
from sorsa_plugin.errors import AdapterOptionsError, SORSAError
from sorsa_plugin.extend import say
from sorsa_transformers.checkpoints import is_complete, last_complete_checkpoint
from sorsa_transformers.finished_runs import take_no_step_when_finished

from .data import load_data, split
from .recipe import Recipe, RecipeParser

LAST = ("true", "last", "auto", "latest")
"""Values of resume_from_checkpoint that mean the last complete checkpoint."""


def train(recipe: Recipe, callbacks: Sequence[Any] = ()) -> Any:
    """Train, save to output_dir, and push to the hub if the recipe says so.

    Args:
        recipe: what to train.
        callbacks: Trainer callbacks beside those of the adapter.

    Returns:
        The trainer.

    Raises:
        AdapterOptionsError: the recipe names no model or data, or an option that cannot be honoured.
    """
    recipe.require_model()
    script, training, model = recipe.script, recipe.training, recipe.model
    checkpoint = checkpoint_to_resume(training)
    setup = setup_adapter(recipe.adapter)
    if setup.adapter == "adalora":
        say("TRL computes the loss itself, so AdaLoRA's orthogonality penalty (orth_reg_weight) has no effect here.")
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "trust_remote_code": getattr(training, "trust_remote_code", False),
        **(training.model_init_kwargs or {}),
    }
    with _refusals_said(f"{model.model_name_or_path} on {script.dataset_name or 'the datasets of the recipe'}"):
        trainer = _make_trainer(recipe, setup.peft_config, callbacks)
    setup.add_callbacks(trainer)
    take_no_step_when_finished(trainer)
    if script.ignore_bias_buffers:  # as TRL's dpo.py: DDP cannot broadcast boolean buffers
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if str(buffer.dtype) == "torch.bool"
        ]
    if trainer.is_world_process_zero():
        recipe.write(Path(training.output_dir))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training.output_dir)
    trainer.accelerator.print(f"Saved to {training.output_dir}.")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    if hasattr(trainer, "end"):  # transformers >= 5.18: trackers and process group
        trainer.end()
    return trainer


def _make_trainer(recipe: Recipe, peft_config: Any, callbacks: Sequence[Any]) -> Any:
    from transformers import set_seed
    from trl import DPOTrainer, SFTTrainer, get_quantization_config

    script, training, model = recipe.script, recipe.training, recipe.model
    set_seed(training.seed)  # TRL 1.9 draws LoRA's random factors before its trainer does this
    data = load_data(script, recipe.datasets)
    evaluates = str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no"
    return {"sft": SFTTrainer, "dpo": DPOTrainer}[recipe.command](
        model=model.model_name_or_path,
        args=training,
        train_dataset=split(data, script.dataset_train_split),
        eval_dataset=split(data, script.dataset_test_split) if evaluates else None,
        quantization_config=get_quantization_config(model),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


@contextmanager
def _refusals_said(run: str) -> Iterator[None]:
    """In this context, an error of a library becomes one line: an absent model, modules that it does not have."""
    try:
        yield
    except SORSAError:
        raise
    except (OSError, ValueError) as error:
        raise AdapterOptionsError(f"The recipe, {run}, cannot be honoured: {' '.join(str(error).split())}") from error


def checkpoint_to_resume(training: Any) -> str | None:
    """The checkpoint that resume_from_checkpoint names: a directory, or `true` for the last complete one.

    Returns:
        Its path; None to start from the beginning.

    Raises:
        AdapterOptionsError: the directory is no complete checkpoint.
    """
    wanted = training.resume_from_checkpoint
    if not wanted or str(wanted).lower() in ("false", "no"):
        return None
    last = last_complete_checkpoint(training.output_dir)
    if str(wanted).lower() in LAST:
        if last is None:
            say("There is no complete checkpoint in %s yet: training starts from the beginning.", training.output_dir)
        return last
    if not is_complete(Path(wanted)):
        raise AdapterOptionsError(
            f"resume_from_checkpoint is {wanted}, which is no complete checkpoint; the last complete one in "
            f"{training.output_dir} is {last}. Give that, or true."
        )
    return str(wanted)


def main(arguments: list[str]) -> int:
    """What `accelerate launch` runs in every process. Returns the exit status.

    Args:
        arguments: the command's name ("sft" or "dpo"), then its arguments.
    """
    try:
        train(RecipeParser(arguments[0]).parse(arguments[1:]))
    except SORSAError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
