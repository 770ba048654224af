"""The command-line options that several commands share: the base, the adapter on it, and the output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from sorsa_plugin.config import SORSAConfig

DTYPES = ("float32", "bfloat16", "float16")

Model = Annotated[str, typer.Option("--model", help="Directory of the base model, or its id on the hub.")]
Base = Annotated[str, typer.Option("--base", help="Directory of the base model, or its id on the hub.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the base model on the hub.")]
Rank = Annotated[int, typer.Option("--rank", "-r", help="Singular triplets trained per weight.")]
Targets = Annotated[
    str, typer.Option("--target-modules", help='Names, comma-separated, a regular expression, "all-linear", or "".')
]
TargetParameters = Annotated[
    str | None,
    typer.Option(
        "--target-parameters", help="Parameters that are no layer's weight, comma-separated: mlp.experts.down_proj."
    ),
]
Excluded = Annotated[str | None, typer.Option("--exclude-modules", help="Names or a regular expression to leave out.")]
Layers = Annotated[str | None, typer.Option("--layers", help="Layer indices to adapt, comma-separated; default: all.")]
RankPattern = Annotated[
    list[str] | None, typer.Option("--rank-pattern", help="NAME=RANK where the rank differs; may be repeated.")
]
ModulesToSave = Annotated[
    str | None, typer.Option("--modules-to-save", help="Modules trained in full, comma-separated.")
]
TaskType = Annotated[
    str, typer.Option("--task-type", help='PEFT\'s task type, or "none" for the architecture that config.json names.')
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help=f"{', '.join(DTYPES)}: how the base will be loaded; default: its own.")
]
Adapter = Annotated[Path, typer.Argument(help="Directory of a saved SORSA adapter.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to make; it may exist and be empty.")]


def sorsa_config(
    rank: int,
    target_modules: str,
    exclude_modules: str | None,
    layers: str | None,
    rank_pattern: list[str] | None,
    modules_to_save: str | None,
    task_type: str,
    target_parameters: str | None = None,
    **others: Any,
) -> SORSAConfig:
    """The config that the options describe.

    Raises:
        SORSAConfigError: an option cannot be honoured.
    """
    from sorsa_plugin.config import SORSAConfig

    return SORSAConfig(
        r=rank,
        target_modules=names_or_expression(target_modules),
        target_parameters=_parts(target_parameters) or None,
        exclude_modules=names_or_expression(exclude_modules) if exclude_modules else None,
        layers_to_transform=[_integer(part, "--layers") for part in _parts(layers)] if layers else None,
        rank_pattern=dict(_pair(text) for text in rank_pattern or []),
        modules_to_save=_parts(modules_to_save) if modules_to_save else None,
        task_type=task(task_type),
        **others,
    )


def task(name: str) -> str | None:
    """PEFT's task type, or None for "none".

    Raises:
        SORSAConfigError: PEFT has no such type.
    """
    from peft import TaskType

    from sorsa_plugin.errors import SORSAConfigError

    if name.lower() == "none":
        return None
    if name not in list(TaskType):
        raise SORSAConfigError(f"--task-type is {name!r}; expected one of {', '.join(TaskType)}, or none.")
    return name


def names_or_expression(text: str) -> list[str] | str:
    """A list of names if every comma-separated part is a name, else a regular expression or "all-linear" as it is."""
    names = _parts(text)
    plain = all(part.replace(".", "").replace("_", "").replace("-", "").isalnum() for part in names)
    return names if plain and text != "all-linear" else text


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of an option.

    Raises:
        SORSAConfigError: it is not one of `DTYPES`.
    """
    import torch

    from sorsa_plugin.errors import SORSAConfigError

    if name is None:
        return None
    if name not in DTYPES:
        raise SORSAConfigError(f"--dtype is {name!r}; expected one of {', '.join(DTYPES)}.")
    return getattr(torch, name)


def _parts(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _pair(text: str) -> tuple[str, int]:
    from sorsa_plugin.errors import SORSAConfigError

    name, separator, rank = text.rpartition("=")
    if not separator:
        raise SORSAConfigError(f"--rank-pattern is {text!r}; expected NAME=RANK, such as q_proj=64.")
    return name, _integer(rank, "--rank-pattern")


def _integer(text: str, option: str) -> int:
    from sorsa_plugin.errors import SORSAConfigError

    try:
        return int(text)
    except ValueError as error:
        raise SORSAConfigError(f"{option} has {text!r} where an integer belongs.") from error
