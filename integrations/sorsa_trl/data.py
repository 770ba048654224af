"""Loads the data that a recipe names: a jsonl, json, csv or parquet file, a directory, or a hub id."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sorsa_plugin.errors import AdapterOptionsError

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""{file suffix: builder of `datasets`}"""


def load_data(script: Any, mixture: Any) -> Any:
    """The splits that TRL's ScriptArguments or DatasetMixtureConfig name. The mixture takes precedence, as in TRL.

    Raises:
        AdapterOptionsError: neither names any data, or the file is empty.
    """
    from datasets import load_dataset, load_from_disk
    from trl import get_dataset

    if mixture.datasets:
        mixture.datasets = [_with_builder(part) for part in mixture.datasets]
        return get_dataset(mixture)
    if not script.dataset_name:
        raise AdapterOptionsError("No data: give dataset_name, a file, a directory or a hub id, or a datasets mixture.")
    path = Path(script.dataset_name)
    if path.suffix in FORMATS and path.is_file():
        if path.stat().st_size == 0:
            raise AdapterOptionsError(f"{path} is empty; expected one example at least.")
        return load_dataset(FORMATS[path.suffix], data_files=str(path), streaming=script.dataset_streaming)
    if (path / "dataset_dict.json").is_file():  # written by DatasetDict.save_to_disk
        return load_from_disk(str(path))
    if (path / "state.json").is_file():  # written by Dataset.save_to_disk
        return {"train": load_from_disk(str(path))}
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def split(data: Any, name: str) -> Any:
    """One split of the data.

    Raises:
        AdapterOptionsError: there is none of that name.
    """
    if name not in data:
        raise AdapterOptionsError(
            f"The data has the splits {', '.join(data)}; expected {name!r}. Name another with dataset_train_split or "
            "dataset_test_split, set test_split_size for a mixture, or turn evaluation off with eval_strategy: 'no'."
        )
    return data[name]


def _with_builder(part: Any) -> Any:
    """A part of a mixture in the form that `datasets` needs, if its path is a file."""
    suffix = Path(part.path).suffix
    if suffix in FORMATS and Path(part.path).is_file():
        return replace(part, path=FORMATS[suffix], data_files=part.path)
    return part
