"""What every process of a resumption test runs: some steps with checkpoints, from the last complete one where asked.

torchrun --nproc_per_node 2 resume_worker.py OUTPUT_DIR ENGINE --steps 6 [--resume] [--state-dict ...] [--die-at STEP]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path

import torch
from builders.engines import ENGINES, build_model, engine_arguments, leave, perturb, prepare
from builders.llama import token_batches
from transformers import TrainerCallback


class Dies(TrainerCallback):
    """Kills the last rank in the middle of a step, as a lost node would be."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-steps", type=int, default=3)
    parser.add_argument("--state-dict", choices=["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
    parser.add_argument("--update", default="coupled")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--universal", action="store_true", help="resume from DeepSpeed's universal format")
    parser.add_argument("--die-at", type=int)
    options = parser.parse_args()
    prepare(options.engine)

    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from sorsa_plugin import SORSAConfig
    from sorsa_transformers import SORSACallback, last_complete_checkpoint

    engine = engine_arguments(options.engine)
    if options.state_dict:
        engine["fsdp_config"]["state_dict_type"] = options.state_dict
    if options.universal:
        engine["deepspeed"]["checkpoint"] = {"load_universal": True}
        # DeepSpeed gives the sub-groups of ZeRO 3 one and the same `step` tensor, which then counts each of them
        engine["deepspeed"]["zero_optimization"].pop("sub_group_size")
    arguments = TrainingArguments(
        str(options.output / "run"),
        max_steps=options.steps,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_epsilon=1e-2,
        max_grad_norm=0.02,
        bf16=options.bf16,
        logging_steps=1,
        save_steps=options.save_steps,
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **engine,
    )
    config = SORSAConfig(
        r=4,
        rank_pattern={"q_proj": 3},
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        gamma=0.05,
        reg_update=options.update,
    )
    model = get_peft_model(build_model(), config)
    perturb(model, to_bf16=options.bf16)
    callbacks = [SORSACallback(), *([Dies(options.die_at)] if options.die_at else [])]
    trainer = Trainer(model, arguments, train_dataset=token_batches(96), callbacks=callbacks)
    checkpoint = last_complete_checkpoint(arguments.output_dir) if options.resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    if options.state_dict:  # as transformers' examples do: with sharded state dicts the trainer saves no model
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(options.output / "adapter"))
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (options.output / "report.json").write_text(json.dumps({"losses": losses, "resumed_from": checkpoint}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    leave()
