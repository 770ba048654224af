"""Direct preference optimisation with TRL and SORSA: the reference is the untouched base, no second model in memory.

python examples/trl_dpo.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from sorsa_plugin import SORSAConfig
from sorsa_quickstart.answering import BASE
from sorsa_trl import SORSADPOTrainer

DATA = Path(__file__).parent / "data" / "gsm8k_preferences.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BASE), help="directory or hub id of a causal language model")
    parser.add_argument("--data", default=str(DATA), help="a jsonl file with prompt, chosen and rejected")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--max-steps", type=int, default=10)
    parser.add_argument("--output", default="runs/trl_dpo")
    options = parser.parse_args()

    trainer = SORSADPOTrainer(  # trl's DPOTrainer; or that one, with the same peft_config
        AutoModelForCausalLM.from_pretrained(options.model),
        args=DPOConfig(
            options.output,
            learning_rate=options.lr,
            max_steps=options.max_steps,
            per_device_train_batch_size=4,
            max_length=384,
            logging_steps=1,
            bf16=False,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=SORSAConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    first = next(entry["sorsa/task_loss"] for entry in trainer.state.log_history if "sorsa/task_loss" in entry)
    print(f"first DPO loss {first:.7f}: log 2 = 0.6931472 says that policy and reference began equal")
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
