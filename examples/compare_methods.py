"""One recipe, several methods: trainable parameters, step time, peak memory, loss and accuracy side by side.

    python examples/compare_methods.py                                        on the embedded base and rows of GSM8K
    python examples/compare_methods.py --config my_recipe.yaml --methods sorsa lora full --lr sorsa=3e-5 lora=2e-4

Any recipe of `sorsa sft` with an evaluation split will do. Each method runs in a process of its own, so that peak
memory is its own; they run one after another, so step times are comparable only on an idle machine. A fair comparison
gives each method its best learning rate (--lr).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

RECIPE = Path(__file__).parent / "recipes" / "sft.yaml"
COLUMNS = ("trainable", "step_ms", "peak_mib", "train_loss", "eval_loss", "eval_accuracy")


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def run_one(arguments: list[str]) -> dict[str, float]:
    """Train one method in this process."""
    from sorsa_trl.recipe import RecipeParser
    from sorsa_trl.train import train

    times = StepTimes()
    trainer = train(RecipeParser("sft").parse(arguments), callbacks=[times])
    evaluation = trainer.evaluate()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    losses = losses or [entry["train_loss"] for entry in history if "train_loss" in entry]  # a run shorter than that
    return {
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "step_ms": 1000 * sorted(times.seconds)[len(times.seconds) // 2],
        "peak_mib": (peak or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20,
        "train_loss": losses[-1],
        "eval_loss": evaluation["eval_loss"],
        "eval_accuracy": evaluation["eval_mean_token_accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=RECIPE, help="a recipe of `sorsa sft`")
    parser.add_argument("--methods", nargs="+", default=["sorsa", "lora", "pissa", "dora", "miss", "full"])
    parser.add_argument("--lr", nargs="*", default=[], metavar="METHOD=RATE", help="learning rates that differ")
    parser.add_argument("--output", type=Path, default=Path("runs/compare_methods"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.one:
        print(json.dumps(run_one(["--config", str(options.config), "--adapter", options.one, *rest])))
        return
    rates = dict(item.split("=") for item in options.lr)
    results = {}
    for method in options.methods:
        line = [sys.executable, __file__, "--one", method, "--config", str(options.config), *rest]
        line += ["--output_dir", str(options.output / method)]
        line += ["--learning_rate", rates[method]] if method in rates else []
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{method} failed:\n{done.stderr[-3000:]}")
        results[method] = json.loads(done.stdout.splitlines()[-1])
    (options.output / "comparison.json").write_text(json.dumps(results, indent=2) + "\n")
    table = Table("method", *COLUMNS)
    for method, row in results.items():
        table.add_row(method, *(f"{row[name]:,.0f}" if row[name] > 100 else f"{row[name]:.4g}" for name in COLUMNS))
    Console().print(table)


if __name__ == "__main__":
    main()
