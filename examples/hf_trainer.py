"""Fine-tune any causal language model with SORSA, or another method by one word, and the Hugging Face Trainer.

    python examples/hf_trainer.py --model PATH_OR_HUB_ID --data FILE_OR_HUB_ID --output runs/my-run
    python examples/hf_trainer.py ... --adapter lora --lr 2e-4

The data is jsonl, json or parquet, or a hub data set, with one of
    {"prompt": ..., "completion": ...}      {"question": ..., "answer": ...}      {"instruction": ..., "output": ...}
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
Run it again with --resume after an interruption. On several GPUs launch the same script by torchrun, accelerate launch
or deepspeed: examples/distributed. What differs from a LoRA script is marked with (1) to (3).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sorsa_plugin import gaps, setup_adapter
from sorsa_transformers import last_complete_checkpoint
from sorsa_transformers.data import encode_all


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id of a causal language model")
    parser.add_argument("--data", required=True, help="jsonl, json or parquet file, or hub id of a data set")
    parser.add_argument("--output", default="runs/hf_trainer", type=Path)
    parser.add_argument("--adapter", default="sorsa", help="sorsa, lora, pissa, dora, ..., full")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--target-modules", default="all-linear", help="all-linear, or names separated by commas")
    parser.add_argument("--lr", type=float, default=3e-5, help="published for 7B models; see `sorsa advise`")
    parser.add_argument("--gamma", type=float, help="rate of SORSA's orthonormal regularizer; default: the method's")
    parser.add_argument("--batch", type=int, default=8, help="examples per device and step")
    parser.add_argument("--accumulation", type=int, default=1, help="gradient accumulation steps")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--max-length", type=int, default=1024, help="in tokens")
    parser.add_argument("--limit", type=int, help="use only the first so many examples")
    parser.add_argument("--eval-examples", type=int, default=64, help="held out from the end of the data")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--deepspeed", help="DeepSpeed's configuration, where accelerate's does not name one")
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint")
    return parser.parse_args()


def load_examples(source: str) -> Dataset:
    """A file, or a hub data set's train split."""
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if Path(source).suffix in kinds:
        return load_dataset(kinds[Path(source).suffix], data_files=source, split="train")
    return load_dataset(source, split="train")


def main() -> None:
    options = parse_arguments()
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    examples = load_examples(options.data)
    if options.limit:
        examples = examples.select(range(min(options.limit, len(examples))))
    encoded = encode_all(examples, tokenizer, options.max_length)
    held_out = min(options.eval_examples, len(encoded) // 10)
    train, evaluation = encoded[: len(encoded) - held_out], encoded[len(encoded) - held_out :]

    arguments = TrainingArguments(  # before the model: an engine that shards it announces itself here
        str(options.output),
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # as a share of all steps
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        bf16=options.bf16,
        gradient_checkpointing=options.gradient_checkpointing,
        eval_strategy="epoch" if held_out else "no",
        eval_on_start=held_out > 0,
        logging_steps=10,
        logging_first_step=True,
        save_steps=200,
        save_total_limit=2,
        report_to=options.report_to,
        seed=options.seed,
        deepspeed=options.deepspeed,
    )
    model = AutoModelForCausalLM.from_pretrained(options.model)
    names = options.target_modules
    setup = setup_adapter(  # (1) one word for the method; SORSA has no alpha, and a learning rate ten times smaller
        {
            "adapter": options.adapter,
            "r": options.rank,
            "target_modules": names if names == "all-linear" else names.split(","),
            "task_type": "CAUSAL_LM",
            "sorsa": {"gamma": options.gamma},
        }
    )
    model = setup.wrap(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if arguments.process_index == 0:
        print(f"{options.adapter}: {trained:,} trainable parameters")

    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=evaluation or None,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    setup.add_callbacks(trainer)  # (2) what the method needs during training
    checkpoint = last_complete_checkpoint(options.output) if options.resume else None  # (3) never a half-written one
    result = trainer.train(resume_from_checkpoint=checkpoint)
    before = next((entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry), math.nan)
    after = trainer.evaluate()["eval_loss"] if held_out else math.nan
    trainer.save_model(str(options.output / "adapter"))

    # a collective where an engine shards the factors: every process asks
    final_gaps = gaps(trainer.model).values() if options.adapter == "sorsa" else []
    summary = {
        "adapter": options.adapter,
        "trainable": trained,
        "examples": len(train),
        "processes": arguments.world_size,
        "steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        "eval_loss_before": before,
        "eval_loss_after": after,
        "gap_mean": sum(final_gaps) / len(final_gaps) if final_gaps else None,
        "gap_max": max(final_gaps, default=None),
        "seconds": result.metrics["train_runtime"],
    }
    if trainer.is_world_process_zero():
        (options.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
