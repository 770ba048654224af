"""`sorsa init`: writes an untrained adapter, or with --quantize a residual model, and prints how to load it."""

from __future__ import annotations

import typer

from . import options
from .formatting import size


def init(
    model: options.Model,
    output: options.Output,
    rank: options.Rank = 128,
    target_modules: options.Targets = "all-linear",
    target_parameters: options.TargetParameters = None,
    exclude_modules: options.Excluded = None,
    layers: options.Layers = None,
    rank_pattern: options.RankPattern = None,
    modules_to_save: options.ModulesToSave = None,
    svd: str = typer.Option("auto", help="auto, exact or randomized."),
    svd_seed: int = typer.Option(0, min=0, help="Seed of the randomized factorisation."),
    gamma: float | None = typer.Option(None, help="Rate of the orthonormal regularizer; default: the update's."),
    reg_update: str = typer.Option("coupled", help="coupled or decoupled."),
    reg_schedule: str | None = typer.Option(None, help="Decoupled only: lr or constant."),
    sorsa_dropout: float = typer.Option(0.0, help="Dropout on the input of the change."),
    task_type: options.TaskType = "CAUSAL_LM",
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    quantize: str | None = typer.Option(
        None, help="nf4, fp4 or int8: write the quantised residual model too (QSORSA), with the adapter in a folder."
    ),
) -> None:
    """Write an untrained, complete adapter, so that training starts without any factorisation.

    Weights are read and factorised one at a time. Interrupted, the same command continues where it stopped (with
    --quantize: begins anew).
    """
    from sorsa_plugin.qsorsa.prepare import init_residual
    from sorsa_plugin.tools.init_adapter import init_adapter

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
        svd_seed=svd_seed,
        gamma=gamma,
        reg_update=reg_update,
        reg_schedule=reg_schedule,
        sorsa_dropout=sorsa_dropout,
    )
    if quantize is not None:
        made = init_residual(
            model, output, config, quantize=quantize, dtype=options.torch_dtype(dtype), revision=revision
        )
        plain, residual = made.rounding
        typer.echo(
            f"Quantised residual model ({quantize}) and adapter of {len(made.layers)} layers, "
            f"{made.trainable_parameters:,} trainable parameters, in {made.output}: {size(made.bytes)}. The weights' "
            f"mean relative error is {residual:.3g}, and {plain:.3g} in plain {quantize}."
        )
        typer.echo(
            f'Start with that model as base: PeftModel.from_pretrained(base, "{made.adapter}", is_trainable=True).'
        )
        return
    report = init_adapter(model, output, config, dtype=options.torch_dtype(dtype), revision=revision)
    kept = f" ({report.resumed} from an interrupted run)" if report.resumed else ""
    typer.echo(
        f"Adapter of {len(report.layers)} layers{kept}, {report.trainable_parameters:,} trainable parameters, in "
        f"{report.output}: {size(report.bytes)}."
    )
    typer.echo(f'Start with PeftModel.from_pretrained(base, "{output}", is_trainable=True).')
