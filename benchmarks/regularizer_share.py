"""How much of a training step the regularizer takes: the embedded model under the Trainer's loop, with and without.

    python benchmarks/regularizer_share.py

Times the two hooks themselves inside real steps (batch 32, no accumulation), so the figure is a share of the step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import write
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq

from sorsa_plugin import SORSAConfig, attach
from sorsa_quickstart.answering import load_base
from sorsa_quickstart.task import train_examples
from sorsa_transformers.data import encode_all


def measure(update: str, steps: int) -> dict[str, Any]:
    model, tokenizer = load_base()
    model = get_peft_model(
        model, SORSAConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", reg_update=update)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    attachment = attach(model, optimizer)
    collate = DataCollatorForSeq2Seq(tokenizer)
    data = encode_all(train_examples(32 * (steps + 3)), tokenizer, max_length=256)
    spent = [0.0]
    for handle in attachment.handles:
        handle.remove()

    def timed(hook: Any) -> Any:
        def run(*arguments: Any) -> None:
            start = time.perf_counter()
            hook(*arguments)
            spent[0] += time.perf_counter() - start

        return run

    optimizer.register_step_pre_hook(timed(attachment.before_step))
    optimizer.register_step_post_hook(timed(attachment.after_step))
    attachment.handles = [None]  # marked as attached, so that the first step does not attach again
    shares = []
    for step in range(steps + 3):
        batch = collate(data[32 * step : 32 * step + 32])
        spent[0] = 0.0
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 3:
            shares.append(spent[0] / (time.perf_counter() - start))
    low, middle, high = statistics.quantiles(shares, n=4)
    return {"update": update, "share": middle, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    rows = [measure(update, options.steps) for update in ("coupled", "decoupled")]
    for row in rows:
        print(f"{row['update']:10} {row['share']:.2%} of a step (quartiles {row['low']:.2%} to {row['high']:.2%})")
    write("regularizer_share", {"rows": rows})


if __name__ == "__main__":
    main()
