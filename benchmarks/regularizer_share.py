"""How much of a training step the regularizer takes: the embedded model in a plain loop, no accumulation.

    python benchmarks/regularizer_share.py [--device cuda] [--repeats 30]

Times the optimizer hooks inside real steps (batch 32), so the figure is a share of the step.
"""

from __future__ import annotations

import time
from functools import wraps
from typing import Any

import torch
from common import Chart, Table, arguments, publish, spread, synchronise, timed
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq

from sorsa_plugin import SORSAConfig, attach
from sorsa_plugin.regularizer.step_hooks import Attachment
from sorsa_quickstart.answering import load_base
from sorsa_quickstart.task import train_examples
from sorsa_transformers.data import encode_all

BATCH, WARMUP = 32, 3

spent = [0.0]
"""Seconds that the hooks have taken."""


def measured(hook: Any) -> Any:
    @wraps(hook)
    def run(*args: Any) -> None:
        spent[0] += timed(lambda: hook(*args))

    return run


def measure(update: str, options: Any) -> dict[str, Any]:
    model, tokenizer = load_base()
    config = SORSAConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", reg_update=update)
    model = get_peft_model(model.to(options.device), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    attach(model, optimizer)
    collate = DataCollatorForSeq2Seq(tokenizer)
    data = encode_all(train_examples(BATCH * (options.repeats + WARMUP)), tokenizer, max_length=256)
    shares, hooks = [], []
    for step in range(options.repeats + WARMUP):
        batch = collate(data[BATCH * step : BATCH * (step + 1)]).to(options.device)
        spent[0] = 0.0
        synchronise()
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronise()
        if step >= WARMUP:
            shares.append(spent[0] / (time.perf_counter() - start))
            hooks.append(spent[0])
    return {"update": update, "share": spread(shares), "seconds": spread(hooks)}


def table(rows: list[dict[str, Any]]) -> Table:
    lines = [
        [
            row["update"],
            f"{row['seconds']['median'] * 1e3:.2f}",
            "{median:.2%} ({low:.2%}-{high:.2%})".format(**row["share"]),
        ]
        for row in rows
    ]
    columns = ["update", "ms a step", "of a step: median (quartiles)"]
    return Table(f"regularizer, embedded model, 56 factors, batch {BATCH}", columns, lines)


def main() -> None:
    options = arguments(__doc__, repeats=30).parse_args()
    Attachment.before_step = measured(Attachment.before_step)  # type: ignore[method-assign]
    Attachment.after_step = measured(Attachment.after_step)  # type: ignore[method-assign]
    rows = [measure(update, options) for update in ("coupled", "decoupled")]
    shares = [100 * row["share"]["median"] for row in rows]
    chart = Chart("regularizer", "% of a step", [row["update"] for row in rows], {"": shares})
    publish("regularizer_share", options.device, {"repeats": options.repeats, "rows": rows}, table(rows), [chart])


if __name__ == "__main__":
    main()
