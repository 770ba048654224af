"""Supervised fine-tuning with TRL: the whole difference from LoRA is one word.

python examples/trl_sft.py                      SORSA on the embedded base and rows of GSM8K
python examples/trl_sft.py --adapter lora       the same with LoRA
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from sorsa_plugin import setup_adapter
from sorsa_quickstart.answering import BASE
from sorsa_trl import with_orthonormal_loss

DATA = Path(__file__).parent / "data" / "gsm8k"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BASE), help="directory or hub id of a causal language model")
    parser.add_argument(
        "--data",
        default=str(DATA),
        help="directory or hub id with splits train and test, of prompt and completion or of messages",
    )
    parser.add_argument("--adapter", default="sorsa", help="sorsa, lora, pissa, dora, ..., full")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="3e-5 is the published rate for 7B models")
    parser.add_argument("--max-steps", type=int, default=30)
    parser.add_argument("--output", default="runs/trl_sft")
    options = parser.parse_args()

    # the one word: a SORSAConfig and its callback, a LoraConfig, nothing at all, ...
    setup = setup_adapter(
        {"adapter": options.adapter, "r": options.r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    )
    # optional: reports training loss + penalty, and both on their own; without it the weights train just the same
    trainer_class = with_orthonormal_loss(SFTTrainer) if options.adapter == "sorsa" else SFTTrainer
    data = load_dataset(options.data)
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(options.model),
        args=SFTConfig(
            options.output,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            max_steps=options.max_steps,
            per_device_train_batch_size=8,
            max_length=256,
            logging_steps=5,
            eval_strategy="steps",
            eval_steps=15,
            bf16=False,
            report_to="none",
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=setup.peft_config,
    )
    if options.adapter != "sorsa":  # the loss wrapper brings SORSA's
        setup.add_callbacks(trainer)
    trainer.train()
    trainer.save_model(options.output)
    print(f"{options.adapter}: saved to {options.output}")


if __name__ == "__main__":
    main()
