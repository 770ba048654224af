"""`sorsa advise`: prints a learning rate to start from, and what it rests on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from . import options

if TYPE_CHECKING:
    from sorsa_plugin.tools.advise import Advice


def advise(
    model: options.Model,
    rank: options.Rank,
    lora_lr: float | None = typer.Option(None, help="A learning rate at which LoRA trains well on the same task."),
    revision: options.Revision = None,
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Suggest a learning rate from a model's config, without its weights, and say what it rests on."""
    from sorsa_plugin.tools.advise import advise as find_advice

    advice = find_advice(model, rank, lora_lr, revision)
    typer.echo(json.dumps(asdict(advice), indent=2) if as_json else _page(advice))


def _page(advice: Advice) -> str:
    rate = advice.learning_rate
    weights = ", ".join(f"{weight:.2g}" for weight in advice.loss_weights)
    lines = [
        f"SORSA on {advice.model}: width {advice.width}, rank {advice.rank}",
        f"start from learning rate: {rate.rate:g}",
        f"sweep: {', '.join(f'{each:g}' for each in rate.sweep)}",
        f"far off: below {rate.low:g}, above {rate.high:g}",
        f"this is {rate.basis}",
        f"gamma: {advice.gamma:g}, the default. The regularizer's loss weighs gamma / rate: {weights} in the sweep",
        f"healthy: sorsa/gap_mean up to {advice.healthy_gap:g}; above {advice.unhealthy_gap:g} the rate is too high, "
        "or gamma too small (measured on one task)",
    ]
    if advice.rate_from_lora is not None:
        lines.append(
            f"if LoRA's best rate here is {advice.lora_learning_rate:g}, and not just its usual one: "
            f"{advice.rate_from_lora:g} (extrapolated: their ratio was measured on one task, width 128, rank 16). "
            "Where the two rates differ, sweep from one to the other"
        )
    lines.append("for AdamW; docs/hyperparameters.md has the numbers")
    return "\n".join(lines)
