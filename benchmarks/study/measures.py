"""What a trained model is measured by: loss on the task and on other text, divergence from the base, and change."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from sorsa_plugin import gaps
from sorsa_transformers.data import IGNORED

from .base import BF16, Hidden, TopLayers

BATCH = 16


def padded(rows: list[Hidden]) -> dict[str, torch.Tensor]:
    """Rows of different length as one batch, padded on the right."""
    lengths = [len(row["labels"]) for row in rows]
    embeds = nn.utils.rnn.pad_sequence([row["inputs_embeds"] for row in rows], batch_first=True)
    labels = nn.utils.rnn.pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return {"inputs_embeds": embeds, "labels": labels, "attention_mask": mask.long()}


def batches(rows: list[Hidden]) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """(places in `rows`, batch), rows of like length together."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["labels"]))
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        yield places, padded([rows[place] for place in places])


@torch.no_grad()
def losses(model: Any, rows: list[Hidden]) -> list[float]:
    """Mean negative log-likelihood of each row's labels, in nats a token."""
    found = [0.0] * len(rows)
    for places, batch in batches(rows):
        with torch.autocast(**BF16):
            logits = model(**batch).logits
        labels = batch["labels"][:, 1:]
        said = labels != IGNORED
        values = torch.zeros(labels.shape)
        values[said] = cross_entropy(logits, labels[said], reduction="none")
        for place, value in zip(places, values.sum(1) / said.sum(1), strict=True):
            found[place] = value.item()
    return found


@torch.no_grad()
def divergence(model: Any, base: TopLayers, rows: list[Hidden]) -> float:
    """KL(base || model) on the rows, in nats a token."""
    total, count = 0.0, 0
    for _, batch in batches(rows):
        with torch.autocast(**BF16):
            old, new = (log_softmax(one(**batch).logits, dim=-1) for one in (base, model))
        total += kl_div(new, old, log_target=True, reduction="sum").item()
        count += len(new)
    return total / count


def gap_of(model: Any) -> dict[str, float]:
    """Mean and largest ||P^T P - I||_F of SORSA's factors."""
    values = list(gaps(model).values())
    return {"mean": sum(values) / len(values), "largest": max(values)}


def relative_change(model: Any, base: TopLayers) -> float:
    """||dW|| / ||W|| over all trained weights together, of the merged model."""
    merged = copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model
    tuned = dict(merged.named_parameters())
    change, size = 0.0, 0.0
    for name, weight in base.named_parameters():
        if name.endswith("_proj.weight"):
            change += (tuned[name].double() - weight.double()).square().sum().item()
            size += weight.double().square().sum().item()
    return (change / size) ** 0.5
