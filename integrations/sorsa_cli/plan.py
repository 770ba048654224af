"""`sorsa plan`: prints what training an adapter will take."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from . import options
from .formatting import console, duration, size

if TYPE_CHECKING:
    from sorsa_plugin.tools.plan import LoraPlan, Plan


GPU_SIZES = (16, 24, 40, 48, 80)
"""GB of usual GPUs, which are GiB by their data sheets."""


def plan(
    model: options.Model,
    rank: options.Rank = 128,
    target_modules: options.Targets = "all-linear",
    target_parameters: options.TargetParameters = None,
    exclude_modules: options.Excluded = None,
    layers: options.Layers = None,
    rank_pattern: options.RankPattern = None,
    modules_to_save: options.ModulesToSave = None,
    task_type: options.TaskType = "CAUSAL_LM",
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    gpus: int = typer.Option(1, help="Processes, with a GPU each."),
    engine: str = typer.Option("ddp", help="ddp, fsdp2 or zero3."),
    batch: int = typer.Option(1, help="Sequences on each GPU."),
    length: int = typer.Option(2048, help="Tokens of a sequence."),
    checkpointing: bool = typer.Option(False, help="Recompute activations in backward."),
    optimizer: str = typer.Option("adamw", help="adamw, adamw_8bit or sgd."),
    svd: str = typer.Option("auto", help="auto, exact or randomized."),
    unit_seconds: float | None = typer.Option(
        None, help="Seconds to factorise one 4096 x 4096 weight at this rank; default: measured here."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Count parameters, memory and initialisation time from a model's config, without its weights, beside LoRA's."""
    from sorsa_plugin.tools.plan import plan as make_plan

    config = options.sorsa_config(
        rank,
        target_modules,
        exclude_modules,
        layers,
        rank_pattern,
        modules_to_save,
        task_type,
        target_parameters,
        svd=svd,
    )
    result = make_plan(
        model,
        config,
        dtype=options.torch_dtype(dtype),
        gpus=gpus,
        engine=engine,
        batch=batch,
        length=length,
        checkpointing=checkpointing,
        optimizer=optimizer,
        unit_seconds=unit_seconds,
        revision=revision,
    )
    if as_json:
        content = asdict(result)
        content["memory"]["total"] = result.memory.total
        if result.lora is not None:
            content["lora"]["memory"]["total"] = result.lora.memory.total
        typer.echo(json.dumps(content, indent=2))
    else:
        _show(result, f"{batch} x {length} tokens{', checkpointed' if checkpointing else ''}")


def _show(plan: Plan, work: str) -> None:
    from rich.table import Table

    page = console()
    page.print(f"SORSA on {plan.model} ({plan.dtype})", style="italic", highlight=False, soft_wrap=True)
    layers = Table()
    for name in ("matrices", "module", "out x in", "rank"):
        layers.add_column(name, justify="left" if name == "module" else "right")
    for group in plan.groups:
        layers.add_row(str(group.count), group.kind, f"{group.shape[0]} x {group.shape[1]}", str(group.rank))
    page.print(layers)
    facts: dict[str, Any] = {
        "base parameters": f"{plan.base_parameters:,}",
        "initialisation time, estimated": f"{duration(plan.init_seconds)} ({plan.init_basis})",
    }
    if plan.stacked_parameters:
        facts["not adapted"] = f"{plan.stacked_parameters:,} parameters in stacked tensors (fused experts)"
    for name, value in facts.items():
        page.print(f"{name}: {value}", highlight=False)
    table = Table(title=f"On each of {plan.gpus} GPU(s), {plan.engine}", title_justify="left")
    table.add_column("what")
    costs = {"SORSA": _costs(plan, plan.base_parameters, work)}
    if plan.lora is not None:
        costs["LoRA, same rank"] = _costs(plan.lora, plan.base_parameters, work)
    for heading in costs:
        table.add_column(heading, justify="right")
    for name in costs["SORSA"]:
        ends = name.startswith(("adapter file, in bytes", "activations"))
        table.add_row(name, *(column[name] for column in costs.values()), end_section=ends)
    page.print(table)
    memory = plan.memory
    page.print(_fit(memory.total, unknown=memory.activations is None), highlight=False)
    if plan.lora is None:
        page.print(f"No LoRA beside it: {plan.lora_refusal}", highlight=False)
    else:
        more, times = memory.total - plan.lora.memory.total, plan.adapter_bytes / plan.lora.adapter_bytes
        compared = f"{size(abs(more))} {'more' if more >= 0 else 'less'} memory"
        page.print(f"Beside LoRA: {compared}, and a file {times:.1f} times as large.", highlight=False)


def _costs(adapter: Plan | LoraPlan, base_parameters: int, work: str) -> dict[str, str]:
    memory = adapter.memory
    parts = {
        "base weights": memory.weights,
        "frozen factors U0, S0, V0": memory.frozen_factors,
        "trained parameters": memory.trained,
        "gradients": memory.gradients,
        "optimizer state": memory.optimizer_state,
        "communication, estimated": memory.communication,
        f"activations, estimated ({work})": memory.activations,
        "total memory": memory.total,
    }
    return {
        "trainable parameters": f"{adapter.trainable_parameters:,}",
        "share of the base": f"{adapter.trainable_parameters / base_parameters:.2%}",
        "adapter file": size(adapter.adapter_bytes),
        "adapter file, in bytes": f"{adapter.adapter_bytes:,}",
        **{name: "unknown" if value is None else size(value) for name, value in parts.items()},
    }


def _fit(total: int, unknown: bool) -> str:
    """Which usual GPUs have room, by this plan's total alone; frameworks take a GB or two beside it."""
    enough = next((size for size in GPU_SIZES if total <= size * 2**30), None)
    without = ", without the activations, which are unknown" if unknown else ""
    if enough is None:
        return (
            f"More than a GPU of {GPU_SIZES[-1]} GB holds{without}: see --engine, --gpus, --checkpointing and --length."
        )
    return f"Fits in a GPU of {enough} GB{without}."
