"""What five ways of fine-tuning do to the singular triplets of the embedded base, for docs/analysis.md.

    python benchmarks/analysis_example.py

Every run has the quickstart's data, schedule and seed. SORSA's and LoRA's rates are the best of the quickstart's grid;
PiSSA's is the better of 2e-3 and 4e-3, and the full fine-tuning's the best of 5e-4, 1e-3, 2e-3 and 4e-3.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import write
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, set_seed

from sorsa_plugin import analyze
from sorsa_plugin.tools.analysis.charts import save_plots
from sorsa_quickstart import run as quickstart
from sorsa_quickstart.answering import BASE, answer, load_base
from sorsa_quickstart.task import test_examples, train_examples
from sorsa_transformers.data import encode_all

CHART = Path(__file__).parent.parent / "docs" / "analysis.png"
PISSA = LoraConfig(
    r=quickstart.RANK,
    lora_alpha=quickstart.RANK,
    init_lora_weights="pissa",
    target_modules="all-linear",
    task_type="CAUSAL_LM",
)
RUNS: dict[str, tuple[Any, float]] = {
    "SORSA": (quickstart.adapter_config("sorsa", None), quickstart.LEARNING_RATES["sorsa"]),
    "SORSA, gamma 0": (quickstart.adapter_config("sorsa", 0.0), quickstart.LEARNING_RATES["sorsa"]),
    "PiSSA": (PISSA, 4e-3),
    "LoRA": (quickstart.adapter_config("lora", None), quickstart.LEARNING_RATES["lora"]),
    "full": (None, 2e-3),
}


def train(output: Path, config: Any, rate: float, steps: int, questions: int) -> float:
    """Train one run with a checkpoint every tenth of the steps; its exact match on held-out questions."""
    set_seed(0)
    model, tokenizer = load_base()
    if config is not None:
        model = get_peft_model(model, config)
    arguments = quickstart.training_arguments(output, steps, 0, rate)
    arguments.output_dir = str(output)
    arguments.save_strategy, arguments.save_steps, arguments.disable_tqdm = "steps", max(1, steps // 10), True
    data = encode_all(train_examples(steps * quickstart.BATCH), tokenizer, max_length=256)
    Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer)).train()
    examples = test_examples(questions)
    return quickstart.accuracy(examples, answer(model, tokenizer, examples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--questions", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        paths = {name: Path(scratch) / name for name in RUNS}
        accuracy = {name: train(paths[name], *RUNS[name], options.steps, options.questions) for name in RUNS}
        analysis = analyze(BASE, runs=list(paths.values()))
        save_plots(analysis, scratch)
        CHART.write_bytes((Path(scratch) / "change.png").read_bytes())
    rows = [asdict(row) | {"accuracy": accuracy[row.run]} for row in analysis.summaries() if row.step == options.steps]
    for row in rows:
        numbers = ("accuracy", "d_sigma", "d_direction", "principal_condition_after")
        print(f"{row['run']:16}", *(f"{name} {row[name]:.4g}" for name in numbers if row[name] is not None))
    write("analysis_example", {"steps": options.steps, "questions": options.questions, "rows": rows})


if __name__ == "__main__":
    main()
