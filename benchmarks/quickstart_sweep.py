"""The quickstart's task over methods, learning rates and regularizer rates: accuracy, loss and gap.

    python benchmarks/quickstart_sweep.py --what lr        learning rates of SORSA and LoRA, tuned alike
    python benchmarks/quickstart_sweep.py --what rank      SORSA's learning rates at a lower and a higher rank
    python benchmarks/quickstart_sweep.py --what gamma     the decoupled default gamma, against coupled and none
    python benchmarks/quickstart_sweep.py --what chart     the README's chart again, from the rates' result file

Every run has the quickstart's data, schedule, seed and, except for `rank`, its rank.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, Chart, draw, write
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import DataCollatorForSeq2Seq, Trainer, set_seed

from sorsa_plugin import SORSAConfig, gaps
from sorsa_quickstart import run as quickstart
from sorsa_quickstart.answering import answer, load_base
from sorsa_quickstart.task import test_examples, train_examples
from sorsa_transformers.data import encode_all

CHART = Path(__file__).parent.parent / "docs" / "learning_rates.png"

RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
RUNS: dict[str, list[dict[str, Any]]] = {
    "lr": [{"adapter": name, "lr": lr} for lr in RATES for name in ("sorsa", "lora")],
    "rank": [{"adapter": "sorsa", "rank": rank, "lr": lr} for rank in (4, 64) for lr in (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)],
    "gamma": [
        {"adapter": "sorsa", "gamma": 0.0},
        {"adapter": "sorsa", "gamma": 4e-4},
        *({"adapter": "sorsa", "update": "decoupled", "gamma": gamma} for gamma in (1e-4, 1e-3, 1e-2, 0.1, 0.5)),
        {"adapter": "sorsa", "update": "decoupled", "schedule": "constant", "gamma": 1e-2},
    ],
}


def train(steps: int, questions: int, settings: dict[str, Any]) -> dict[str, Any]:
    set_seed(0)
    model, tokenizer = load_base()
    if settings["adapter"] == "sorsa":
        config: Any = SORSAConfig(
            r=settings.get("rank", quickstart.RANK),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            gamma=settings.get("gamma"),
            reg_update=settings.get("update", "coupled"),
            reg_schedule=settings.get("schedule"),
        )
    else:
        config = quickstart.adapter_config("lora", None)
    model = get_peft_model(model, config)
    lr = settings.get("lr", quickstart.LEARNING_RATES[settings["adapter"]])
    data = encode_all(train_examples(steps * quickstart.BATCH), tokenizer, max_length=256)
    arguments = quickstart.training_arguments(Path("runs/sweep"), steps, 0, lr)
    arguments.disable_tqdm = True
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    examples = test_examples(questions)
    values = list(gaps(model).values()) if settings["adapter"] == "sorsa" else []
    return {
        **settings,
        "lr": lr,
        "accuracy": quickstart.accuracy(examples, answer(model, tokenizer, examples)),
        "loss": losses[-1],
        "gap_mean": sum(values) / len(values) if values else None,
        "gap_max": max(values, default=None),
    }


def draw_rates() -> None:
    """The README's chart: exact match over learning rates, from the committed result file."""
    result = json.loads((RESULTS / "quickstart_lr.json").read_text())
    series: dict[str, list[Any]] = {"SORSA": [], "LoRA": []}
    for row in result["rows"]:
        label = "SORSA" if row["adapter"] == "sorsa" else "LoRA"
        series[label].append((row["lr"], 100 * row["accuracy"]))
    title = f"the quickstart's task, r {quickstart.RANK}, {result['steps']} steps, one seed"
    draw([Chart(title, "exact match, %", [], series, xlabel="learning rate")], CHART)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=[*RUNS, "chart"], required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--questions", type=int, default=100)
    options = parser.parse_args()

    if options.what == "chart":
        draw_rates()
        return
    table = Table(title=f"quickstart task, {options.steps} steps")
    for column in ("adapter", "rank", "update", "gamma", "lr", "exact match", "last loss", "gap mean", "gap max"):
        table.add_column(column, justify="right")
    rows = []
    for settings in RUNS[options.what]:
        row = train(options.steps, options.questions, settings)
        rows.append(row)
        update = f"{row.get('update', '')} {row.get('schedule', '')}".strip()
        table.add_row(
            row["adapter"],
            str(row.get("rank", quickstart.RANK)),
            update or ("coupled" if row["adapter"] == "sorsa" else ""),
            f"{row['gamma']:g}" if "gamma" in row else "default",
            f"{row['lr']:g}",
            f"{row['accuracy']:.0%}",
            f"{row['loss']:.4f}",
            *("" if row[name] is None else f"{row[name]:.4f}" for name in ("gap_mean", "gap_max")),
        )
    Console().print(table)
    write(f"quickstart_{options.what}", {"steps": options.steps, "questions": options.questions, "rows": rows})
    if options.what == "lr":
        draw_rates()


if __name__ == "__main__":
    main()
