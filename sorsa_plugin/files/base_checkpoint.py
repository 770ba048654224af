"""Reads a base model's directory tensor by tensor, and makes its architecture without weights; never holds the model.

    files = BaseFiles("directory or hub id")         # config.json and the headers of the shards; no tensor is read
    files.names, files.shards, files.tensor(name)    # what is stored, under the names it is stored by
    model = files.empty_model("CAUSAL_LM")           # the architecture on the meta device; names as PEFT sees them

Stored names are not always the model's own; `stored_parameters.py` maps one to the other.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..compat.transformers import build_on_meta, kept_in_fp32, load_state_dict
from ..errors import BaseFilesError
from ..model_card import AUTO_CLASSES
from .json_values import UNREADABLE
from .time_limit import time_limit

BUILDING = 300.0
"""Seconds in which any real model is built on the meta device: large ones take a few."""


NEEDED = ["*.json", "*.safetensors"]
"""The files of a hub model to download in order to read its tensors."""

OTHER_WEIGHTS = [
    "pytorch_model*",
    "consolidated*",
    "*.gguf",
    "*.onnx*",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.tflite",
    "*openvino_model*",
]
"""The same weights in other formats, which nothing here reads."""


class BaseFiles:
    """The config and the safetensors shards of a base model.

    Args:
        source: a local directory, or the id of a model on the hub (its config and shards are downloaded).
        revision: of the model on the hub.

    Attributes:
        directory: where the files are.
        config: the model's config; its name_or_path is `source`.
        headers: {stored name: tensor on the meta device}, with the shapes and dtypes stored.
        shards: {shard file: the names stored in it}.

    Raises:
        BaseFilesError: there is no such model, it is stored quantised or not as safetensors, or a file is damaged.
    """

    def __init__(self, source: str | PathLike[str], revision: str | None = None) -> None:
        self.config = read_model_config(source, revision)
        self.directory = local_directory(source, revision, NEEDED)
        self.headers: dict[str, torch.Tensor] = {}
        self.shards: dict[Path, list[str]] = {}
        self._shard_of: dict[str, Path] = {}
        if getattr(self.config, "quantization_config", None) is not None:
            raise BaseFilesError(
                f"{source} is stored quantised (its config.json has a quantization_config); expected plain fp32, bf16 "
                "or fp16 weights. Give the model that it was quantised from."
            )
        for shard in self._shard_files():
            try:
                headers = load_state_dict(str(shard), map_location="meta")
            except (SafetensorError, OSError, ValueError) as error:
                raise BaseFilesError(
                    f"{shard} cannot be read ({error}); expected a complete safetensors file. It is truncated or "
                    "damaged: fetch it again."
                ) from error
            self.shards[shard] = list(headers)
            self.headers |= headers
            self._shard_of |= dict.fromkeys(headers, shard)

    @property
    def names(self) -> list[str]:
        """The names of all stored tensors."""
        return list(self.headers)

    def shard_of(self, name: str) -> Path:
        """The shard that holds a stored tensor."""
        return self._shard_of[name]

    def tensor(self, name: str) -> torch.Tensor:
        """A stored tensor in its stored shape and dtype, on the CPU."""
        with safe_open(self._shard_of[name], framework="pt") as shard:
            return shard.get_tensor(name)

    def empty_model(self, task_type: str | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model of these files on the meta device, in the dtype that from_pretrained would choose.

        Arguments and errors as in the function `empty_model`.
        """
        stored = (header.dtype for header in self.headers.values() if header.is_floating_point())
        return empty_model(self.config, task_type, dtype or self.config.dtype or next(stored, None))

    def _shard_files(self) -> list[Path]:
        index, single = self.directory / SAFE_WEIGHTS_INDEX_NAME, self.directory / SAFE_WEIGHTS_NAME
        if single.is_file():
            return [single]
        if not index.is_file():
            found = sorted(path.name for path in self.directory.glob("*") if path.suffix in (".bin", ".safetensors"))
            raise BaseFilesError(
                f"{self.directory} holds {', '.join(found) or 'no weights'}; expected {single.name}, or shards with "
                f"{index.name}. Load the model with transformers and write it with save_pretrained(directory)."
            )
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            outside = [name for name in sorted(names) if Path(name).is_absolute() or ".." in Path(name).parts]
        except UNREADABLE as error:
            raise BaseFilesError(
                f"{index} cannot be read ({error!r}); expected JSON with a weight_map. It is damaged: fetch it again."
            ) from error
        if outside:
            raise BaseFilesError(
                f"{index} names {outside[0]}, which is outside of {self.directory}; expected shards in it. Load the "
                "model with transformers and write it with save_pretrained(directory)."
            )
        shards = [self.directory / name for name in sorted(names)]
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent:
            raise BaseFilesError(
                f"{self.directory} lacks {', '.join(absent)}, which {index.name} names. The download is incomplete: "
                "fetch it again."
            )
        return shards


def read_model_config(source: str | PathLike[str], revision: str | None = None) -> Any:
    """A model's config, from a directory or the hub; its name_or_path is `source`.

    Raises:
        BaseFilesError: there is no config, or transformers does not know or refuses it.
    """
    try:
        config = AutoConfig.from_pretrained(str(source), revision=revision, trust_remote_code=False)
    except (OSError, StrictDataclassError, *UNREADABLE) as error:
        first = first_line(error)
        raise BaseFilesError(
            f"{source} gives no model config ({first}). Expected a directory with a config.json that transformers "
            "knows, or the id of a model that is on the hub or in the local cache."
        ) from error
    config.name_or_path = str(source)
    return config


def first_line(error: BaseException) -> str:
    """The first line of an error of transformers, with the second, if it is about a refused option."""
    return next(iter(re.sub(r":\s+", ": ", str(error)).strip().splitlines()), repr(error))


def empty_model(config: Any, task_type: str | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a config on the meta device, with the dtypes that from_pretrained would give its parameters.

    Args:
        config: a transformers config.
        task_type: one of PEFT's, for the auto class that users load the model with; None for the architecture that
            config.json names.
        dtype: of the weights; None for the config's, else fp32.

    Raises:
        BaseFilesError: transformers has no model for the config.
    """
    dtype = dtype or config.dtype or torch.float32
    model_class = class_for(config, task_type)
    build = getattr(model_class, "from_config", None) or model_class._from_config
    try:
        with time_limit(f"Building the empty model of {config.name_or_path}", BUILDING, BaseFilesError):
            model = build_on_meta(build, deepcopy(config), dtype)
    except BaseFilesError:
        raise
    except UNREADABLE as error:
        raise BaseFilesError(
            f"{model_class.__name__} cannot be made from the config of {config.name_or_path}: {first_line(error)}"
        ) from error
    for name in kept_in_fp32(model, dtype):
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()
    return model.eval()


def class_for(config: Any, task_type: str | None = None) -> Any:
    """transformers' class that users load the model of a config with; arguments as in `empty_model`.

    Raises:
        BaseFilesError: transformers has no such class.
    """
    named = getattr(config, "architectures", None) or ["AutoModel"]
    first = named[0] if isinstance(named, (list, tuple)) else named
    wanted = AUTO_CLASSES.get(task_type, "AutoModel") if task_type else first
    found = getattr(transformers, wanted, None) if isinstance(wanted, str) else None
    if found is None:
        raise BaseFilesError(f"transformers has no class {wanted}, which the config of {config.name_or_path} names.")
    return found


def local_directory(source: str | PathLike[str], revision: str | None, patterns: list[str] | None) -> Path:
    """The directory of a model's files: a local directory as it is, or the snapshot of a hub id, downloaded if absent.

    Args:
        source: a local directory, or an id on the hub.
        revision: of the model on the hub.
        patterns: which files to download; None for all but weights in other formats than safetensors.

    Raises:
        BaseFilesError: `source` is neither, or cannot be fetched.
    """
    if Path(source).is_dir():
        return Path(source)
    others = OTHER_WEIGHTS if patterns is None else None
    try:
        found = snapshot_download(str(source), revision=revision, allow_patterns=patterns, ignore_patterns=others)
        return Path(found)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BaseFilesError(
            f"{source} is no directory here, and its weights cannot be fetched from the hub "
            f"({str(error).strip().splitlines()[0]}). Give a local directory, or check the id and the connection."
        ) from error
