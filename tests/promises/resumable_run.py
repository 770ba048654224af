"""Training runs, each in a process of its own: `python resumable_run.py DIRECTORY MODE...`, for test_resume.py.

MODE is "whole", "killed" (SIGKILL two steps after the only checkpoint) or "resumed". Each update trains in
DIRECTORY/UPDATE; a run that ends writes log-MODE.json and the adapter in final-MODE there. The interpreter that reads
the arguments trains nothing: it forks a child per run (imports are the slow part) and prints how each ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from builders.trainer_runs import adapted, make_trainer
from transformers import TrainerCallback

from sorsa_plugin.regularizer.optimizers import ETA_MAX
from sorsa_transformers import SORSACallback

STEPS, SAVED_AT, KILLED_AT = 8, 3, 5
LR = 1e-4
OPTIONS = {
    "coupled": {"gamma": 1e-3, "sorsa_dropout": 0.3},
    "decoupled": {"gamma": 0.05, "reg_update": "decoupled", "reg_schedule": "lr"},
}


class Kill(TrainerCallback):
    """Ends the process at once, as the kernel does when memory runs out."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def run(mode: str, directory: Path, update: str) -> None:
    trainer = make_trainer(
        adapted(**OPTIONS[update]),
        directory / mode.replace("resumed", "killed"),
        max_steps=STEPS,
        learning_rate=LR,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        save_strategy="steps",
        save_steps=SAVED_AT if mode == "killed" else STEPS,
    )
    trainer.add_callback(SORSACallback(trainer))
    if mode == "killed":
        trainer.add_callback(Kill())
    trainer.train(resume_from_checkpoint=mode == "resumed")
    trainer.save_model(str(directory / f"final-{mode}"))
    log = {
        "history": [entry for entry in trainer.state.log_history if "train_runtime" not in entry],
        "eta_max": [group[ETA_MAX] for group in trainer.optimizer.param_groups if ETA_MAX in group],
        "steps": trainer.callback_handler.callbacks[-1].attachment.steps,
    }
    (directory / f"log-{mode}.json").write_text(json.dumps(log))


def in_child(mode: str, directory: Path, update: str) -> int:
    """Run in a forked process; its exit status, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            (directory / update).mkdir(exist_ok=True)
            run(mode, directory / update, update)
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    results = {mode: [in_child(mode, Path(sys.argv[1]), update) for update in OPTIONS] for mode in sys.argv[2:]}
    print(json.dumps(results))
