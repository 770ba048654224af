"""One run: train one method at one rate with one seed, and measure it."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import asdict
from typing import Any

import torch
from common import machine
from transformers import Trainer, TrainingArguments, set_seed

from sorsa_plugin import setup_adapter
from sorsa_plugin.errors import SORSAError

from .base import Hidden, TopLayers
from .design import Study
from .measures import divergence, gap_of, losses, padded, relative_change
from .protocol import UNTRAINED, Run


def arguments(study: Study, run: Run, output: str) -> TrainingArguments:
    return TrainingArguments(
        output,
        learning_rate=run.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # as a share of all steps
        max_steps=study.steps,
        per_device_train_batch_size=study.batch,
        weight_decay=0.0,
        bf16=True,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=run.seed,
        use_cpu=True,
    )


def trained(study: Study, run: Run, base: TopLayers, rows: list[Hidden]) -> tuple[Any, list[float]]:
    """The base, trained as the run says, and the losses of training."""
    method = study.method(run.method)
    setup = setup_adapter(method.recipe(study, run.lr))
    set_seed(run.seed)
    model = setup.wrap(copy.deepcopy(base))
    if method.adapter == "full":  # the weights that the others adapt
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("_proj.weight"))
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(model, arguments(study, run, output), train_dataset=rows, data_collator=padded)
        setup.add_callbacks(trainer)
        trainer.train()
    return trainer.model.eval(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measured(study: Study, model: Any, base: TopLayers, data: dict[str, list[Hidden]], final: bool) -> dict[str, Any]:
    """Means, and in a final run also the value of each row."""
    brown = data["brown_test" if final else "brown_validation"]
    items = {"task": losses(model, data["test" if final else "validation"]), "brown": losses(model, brown)}
    if final:
        items["human_eval"] = losses(model, data["human_eval"])
    means = {name: sum(values) / len(values) for name, values in items.items()}
    means["kl"] = divergence(model, base, brown[: study.kl_passages])
    return {"means": means, **({"items": items} if final else {})}


def trained_and_measured(study: Study, run: Run, base: TopLayers, data: dict[str, list[Hidden]]) -> dict[str, Any]:
    if run.method == UNTRAINED:
        return measured(study, base, base, data, run.final)
    try:
        model, history = trained(study, run, base, data["train"])
    except SORSAError as refusal:  # a run that diverged is a result: the rate is too high
        return {"means": {"task": float("inf")}, "refused": str(refusal)}
    return {
        **measured(study, model, base, data, run.final),
        "training_losses": history,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "relative_change": relative_change(model, base),
        "gap": gap_of(model) if study.method(run.method).adapter == "sorsa" else None,
    }


def perform(study: Study, run: Run, base: TopLayers, data: dict[str, list[Hidden]]) -> dict[str, Any]:
    """The result of one run, as its file holds it: settings, machine, times and measures."""
    start, began = time.perf_counter(), time.process_time()
    return {
        "study": study.name,
        "run": asdict(run),
        "lr": run.lr,
        "machine": machine("cpu"),
        **trained_and_measured(study, run, base, data),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - began,
    }


def threads(count: int) -> None:
    """Sums depend on how they are shared out, so a run is repeated bit for bit on the same number of threads alone."""
    torch.set_num_threads(count)
