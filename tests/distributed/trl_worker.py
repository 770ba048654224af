"""What every process of a TRL test runs: SFT and DPO with the loss wrapper on the embedded base.

torchrun --nproc_per_node 2 trl_worker.py OUTPUT_DIR ENGINE
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
from builders.engines import engine_arguments, leave, perturb, prepare


def train(kind: str, engine: str, output: Path) -> dict[str, list[float]]:
    from accelerate.state import AcceleratorState
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from sorsa_plugin import SORSAConfig
    from sorsa_quickstart.answering import load_base
    from sorsa_quickstart.task import train_examples
    from sorsa_trl.loss import with_orthonormal_loss

    AcceleratorState._reset_state()
    examples = train_examples(32)
    if kind == "dpo":
        examples = [{"prompt": e["prompt"], "chosen": e["completion"], "rejected": " no"} for e in examples]
    base, tokenizer = load_base()
    trainer_class, config_class = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}[kind]
    arguments = config_class(
        output_dir=str(output / "run"),
        max_steps=4,
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", "1")),
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        **engine_arguments(engine),
    )
    trainer = with_orthonormal_loss(trainer_class)(
        base,
        args=arguments,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=SORSAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", gamma=0.05),
    )
    perturb(trainer.model)
    trainer.train()
    trainer.save_model(str(output / "adapter"))
    logs = [entry for entry in trainer.state.log_history if "sorsa/reg_loss" in entry]
    names = ("loss", "sorsa/task_loss", "sorsa/reg_loss", "sorsa/gap_mean", "sorsa/gap_max", "sorsa/gamma")
    return {name: [entry[name] for entry in logs] for name in names}


def main() -> None:
    output, engine = Path(sys.argv[1]), sys.argv[2]
    prepare(engine)
    reports = {}
    for kind in ("sft", "dpo"):
        reports[kind] = train(kind, engine, output / kind)
        gc.collect()
    if int(os.environ.get("RANK", "0")) == 0:
        (output / "report.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    leave()
