"""How much of a training step the regularizer takes: the embedded model in a plain loop, no accumulation.

    python benchmarks/regularizer_share.py

Times the two hooks themselves inside real steps (batch 32), so the figure is a share of the step.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from common import Chart, Table, arguments, publish, spread, synchronise
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq

from sorsa_plugin import SORSAConfig, attach
from sorsa_quickstart.answering import load_base
from sorsa_quickstart.task import train_examples
from sorsa_transformers.data import encode_all


def measure(update: str, options: Any) -> dict[str, Any]:
    model, tokenizer = load_base()
    config = SORSAConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", reg_update=update)
    model = get_peft_model(model.to(options.device), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    attachment = attach(model, optimizer)
    collate = DataCollatorForSeq2Seq(tokenizer)
    data = encode_all(train_examples(32 * (options.repeats + 3)), tokenizer, max_length=256)
    spent = [0.0]
    for handle in attachment.handles:
        handle.remove()

    def timed(hook: Any) -> Any:
        def run(*arguments: Any) -> None:
            synchronise()
            start = time.perf_counter()
            hook(*arguments)
            synchronise()
            spent[0] += time.perf_counter() - start

        return run

    optimizer.register_step_pre_hook(timed(attachment.before_step))
    optimizer.register_step_post_hook(timed(attachment.after_step))
    attachment.handles = [None]  # marked as attached, so that the first step does not attach again
    shares, hooks = [], []
    for step in range(options.repeats + 3):
        batch = collate(data[32 * step : 32 * step + 32]).to(options.device)
        spent[0] = 0.0
        synchronise()
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronise()
        if step >= 3:
            shares.append(spent[0] / (time.perf_counter() - start))
            hooks.append(spent[0])
    return {"update": update, "share": spread(shares), "seconds": spread(hooks)}


def tables(result: dict[str, Any]) -> list[Table]:
    rows = [
        [
            row["update"],
            f"{row['seconds']['median'] * 1e3:.2f}",
            *(f"{row['share'][k]:.2%}" for k in ("median", "low", "high")),
        ]
        for row in result["rows"]
    ]
    return [Table("regularizer, embedded model, 56 factors", ["update", "ms", "of a step", "quartiles", ""], rows)]


def charts(result: dict[str, Any]) -> list[Chart]:
    names = [row["update"] for row in result["rows"]]
    return [Chart("regularizer", "% of a step", names, {"": [100 * row["share"]["median"] for row in result["rows"]]})]


def main() -> None:
    options = arguments(__doc__, repeats=30).parse_args()
    result = {"rows": [measure(update, options) for update in ("coupled", "decoupled")]}
    publish("regularizer_share", options.device, result, tables(result), charts(result))


if __name__ == "__main__":
    main()
