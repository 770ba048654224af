"""Asks a model the task's questions. Run as a module in a fresh process, it asks a saved adapter.

python -m sorsa_quickstart.answering ADAPTER_DIR COUNT    prints a JSON list of answers
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = Path(__file__).parent / "base"
BATCH = 50


def load_base() -> tuple[Any, Any]:
    """The embedded base model in fp32 and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), AutoTokenizer.from_pretrained(BASE)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, examples: list[dict[str, str]]) -> list[str]:
    """Greedy completions of the examples' prompts. Puts the model into eval mode."""
    model.eval()
    answers: list[str] = []
    for start in range(0, len(examples), BATCH):
        prompts = [example["prompt"] for example in examples[start : start + BATCH]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def main(adapter: str, count: int) -> None:
    """Load the saved adapter with plain PEFT and answer the first questions of the test set."""
    from peft import PeftModel

    from .task import test_examples

    model, tokenizer = load_base()
    model = PeftModel.from_pretrained(model, adapter)
    print(json.dumps(answer(model, tokenizer, test_examples(count))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
