"""The exact LoRA in a folder of the adapter's own directory, for colleagues who have PEFT and not this package."""

from __future__ import annotations

import shutil
from dataclasses import replace
from os import PathLike
from pathlib import Path

from ..errors import OutputExistsError
from ..files.saved_adapter import read_config
from ..model_card import CARD, complete_saved_card
from ..model_card import LORA as FOLDER
from .export_lora import MADE, ExportReport, Rank, export_lora


def export_beside(
    adapter_dir: str | PathLike[str], *, rank: Rank = None, error: float | None = None, dtype: str = "fp32"
) -> ExportReport:
    """Write an adapter as a LoRA into its own directory, under `lora`. An earlier export there is replaced.

    `PeftModel.from_pretrained(base, directory, subfolder="lora")` loads it, from a hub too, and the adapter's card says
    so. Until the new one is complete, the earlier one stays.

    Args:
        adapter_dir: directory of the adapter.
        rank, error, dtype: see `export_lora`.

    Raises:
        OutputExistsError: the folder holds something else.
        ForeignAdapterError, IncompleteAdapterError, RankError, SORSAConfigError: see `export_lora`.
        UnsupportedLayerError: see `export_lora`.
    """
    config = read_config(Path(adapter_dir))
    folder = Path(adapter_dir).resolve() / FOLDER
    if not folder.exists():
        report = export_lora(adapter_dir, folder, rank=rank, error=error, dtype=dtype)
        complete_saved_card(adapter_dir, config.card_values())
        return report
    if not _is_export(folder):
        raise OutputExistsError(
            f"{folder} exists and was not written by `sorsa export-lora`; expected an earlier export, which would be "
            "replaced, or nothing. Move it away, or export to another directory."
        )
    new = folder.with_name(f".{FOLDER}.new")
    shutil.rmtree(new, ignore_errors=True)
    report = export_lora(adapter_dir, new, rank=rank, error=error, dtype=dtype)
    shutil.rmtree(folder)
    new.rename(folder)
    complete_saved_card(adapter_dir, config.card_values())
    return replace(report, output=folder)


def _is_export(folder: Path) -> bool:
    try:
        return MADE in (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
