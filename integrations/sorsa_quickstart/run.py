"""The quickstart: trains an adapter on the embedded base with the Hugging Face Trainer, and checks the result."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from sorsa_plugin import SORSAConfig, gaps
from sorsa_plugin.errors import SORSAConfigError
from sorsa_plugin.extend import require_matplotlib
from sorsa_transformers import SORSACallback
from sorsa_transformers.data import encode_all

from .answering import answer, load_base
from .task import is_correct, test_examples, train_examples

RANK = 16
BATCH = 32
LEARNING_RATES = {"sorsa": 2e-3, "lora": 1e-2}
"""The best rate of one grid for each adapter: benchmarks/quickstart_sweep.py --what lr."""

TEST_QUESTIONS = 150
SHOWN = 3


def run(adapter: str, steps: int, seed: int, gamma: float | None, output: Path, plot: Path | None) -> dict[str, Any]:
    """Train, check, save, reload in a fresh process, and print what happened.

    Args:
        adapter: "sorsa" or "lora".
        steps: optimizer steps.
        seed: of data order and initialisation.
        gamma: overrides the regularizer's rate; SORSA only.
        output: directory of adapter/ and report.json, which are replaced.
        plot: PNG file for a chart, or None.

    Returns:
        The content of report.json: loss, accuracy before and after, gaps, checks.

    Raises:
        SORSAConfigError: see `adapter_config`.
        MissingPackageError: `plot` is given and matplotlib is not installed.
        RuntimeError: a check failed, or a fresh process could not load the adapter.
    """
    config = adapter_config(adapter, gamma)
    if plot is not None:
        require_matplotlib()
    console = Console()
    for part in ("adapter", "checkpoints"):  # of an earlier run; the directory may hold other things
        shutil.rmtree(output / part, ignore_errors=True)
    set_seed(seed)
    questions = test_examples(TEST_QUESTIONS)

    model, tokenizer = load_base()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = answer(model, tokenizer, questions)

    console.print(f"Base model: {model.num_parameters():,} parameters. Adapter: {adapter}, rank {RANK}.")
    model = get_peft_model(model, config)
    trainer = Trainer(
        model,
        training_arguments(output, steps, seed, LEARNING_RATES[adapter]),
        train_dataset=encode_all(train_examples(steps * BATCH), tokenizer, max_length=256),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    if adapter == "sorsa":
        trainer.add_callback(SORSACallback(trainer))
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started

    after = answer(model, tokenizer, questions)
    final_gaps = gaps(model) if adapter == "sorsa" else {}
    trainer.save_model(str(output / "adapter"))
    reloaded = answers_of_a_fresh_process(output / "adapter", TEST_QUESTIONS)
    with model.disable_adapter():
        disabled = answer(model, tokenizer, questions)

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    report = {
        "adapter": adapter,
        "seed": seed,
        "steps": steps,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "accuracy_before": accuracy(questions, before),
        "accuracy_after": accuracy(questions, after),
        "gap_mean": sum(final_gaps.values()) / len(final_gaps) if final_gaps else None,
        "gap_max": max(final_gaps.values()) if final_gaps else None,
        "base_weights_untouched": untouched(model, weights),
        "disabled_adapter_answers_as_the_base": disabled == before,
        "fresh_process_answers_the_same": reloaded == after,
        "adapter_sha256": hashlib.sha256((output / "adapter/adapter_model.safetensors").read_bytes()).hexdigest(),
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    show(console, report, questions, before, after, seconds)
    if plot is not None:
        draw(plot, trainer.state.log_history)
        console.print(f"Chart: {plot}")
    checks = ("base_weights_untouched", "disabled_adapter_answers_as_the_base", "fresh_process_answers_the_same")
    failed = [name.replace("_", " ") for name in checks if not report[name]]
    if failed:
        raise RuntimeError(f"The quickstart's checks failed: {', '.join(failed)}. Please report this with {output}.")
    return report


def adapter_config(adapter: str, gamma: float | None) -> Any:
    """The PEFT config of the adapter to train.

    Raises:
        SORSAConfigError: the adapter is not one of the two, or gamma is given for LoRA.
    """
    if adapter not in LEARNING_RATES:
        raise SORSAConfigError(f"The adapter is {adapter!r}; expected one of {', '.join(LEARNING_RATES)}.")
    if adapter == "lora":
        if gamma is not None:
            raise SORSAConfigError(f"gamma is {gamma}, and LoRA has no orthonormal regularizer. Drop --gamma.")
        return LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return SORSAConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM", gamma=gamma)


def training_arguments(output: Path, steps: int, seed: int, learning_rate: float) -> TrainingArguments:
    """A cosine schedule with warm-up, as in the paper; on the CPU, where the same seed gives the same numbers."""
    return TrainingArguments(
        str(output / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(0.03 * steps)),
        weight_decay=0.0,
        use_cpu=True,
        logging_steps=max(1, min(10, steps // 5)),
        save_strategy="no",
        report_to="none",
        seed=seed,
    )


def answers_of_a_fresh_process(adapter: Path, count: int) -> list[str]:
    """The answers of the saved adapter when another process loads it with plain PEFT.

    Raises:
        RuntimeError: the process failed; the message has its stderr.
    """
    command = [sys.executable, "-m", "sorsa_quickstart.answering", str(adapter), str(count)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"A fresh process could not load {adapter}:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def accuracy(examples: list[dict[str, str]], answers: list[str]) -> float:
    """Share of answers, 0 to 1, whose final number is exactly right."""
    return sum(map(is_correct, examples, answers)) / len(examples)


def untouched(model: Any, weights: dict[str, torch.Tensor]) -> bool:
    """Whether the base weights under the adapter are bit-equal to the loaded {name: tensor of any shape}."""
    base = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    return all(torch.equal(base[name], tensor) for name, tensor in weights.items())


def show(
    console: Console,
    report: dict[str, Any],
    questions: list[dict[str, str]],
    before: list[str],
    after: list[str],
    seconds: float,
) -> None:
    """Print examples and the report."""
    for example, first, second in list(zip(questions, before, after, strict=True))[:SHOWN]:
        console.print(f"\n[bold]{example['prompt']}[/bold]", highlight=False)
        console.print(f"  before: {first.strip()!r}\n  after:  {second.strip()!r}", highlight=False)
        console.print(f"  right:  {example['completion'].strip()!r}", highlight=False)
    table = Table(title=f"\n{report['adapter']}: {report['steps']} steps in {seconds:.0f} s")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("loss, first and last", f"{report['loss_first']:.3f} -> {report['loss_last']:.3f}")
    table.add_row("exact match before", f"{report['accuracy_before']:.1%}")
    table.add_row("exact match after", f"{report['accuracy_after']:.1%}")
    if report["gap_mean"] is not None:
        table.add_row("orthonormality gap, mean and largest", f"{report['gap_mean']:.4f}, {report['gap_max']:.4f}")
    for check in ("base_weights_untouched", "disabled_adapter_answers_as_the_base", "fresh_process_answers_the_same"):
        table.add_row(check.replace("_", " "), "yes" if report[check] else "[red]NO[/red]")
    console.print(table)


def draw(path: Path, history: list[dict[str, Any]]) -> None:
    """Draw a chart of the training loss and, for SORSA, of the gaps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = {
        "loss": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        "orthonormality gap (mean)": [
            (entry["step"], entry["sorsa/gap_mean"]) for entry in history if "sorsa/gap_mean" in entry
        ],
    }
    series = {name: points for name, points in series.items() if points}
    figure, axes = plt.subplots(1, len(series), figsize=(5 * len(series), 3.5), squeeze=False, layout="constrained")
    for axis, (name, points) in zip(axes[0], series.items(), strict=True):
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3)
        axis.set(title=name, xlabel="optimizer step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
