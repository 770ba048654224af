"""Adapters and models on disk: saved, damaged, and read back."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from builders.adapters import trained
from builders.llama import TOKENS, tiny_llama
from sorsa_plugin import SORSAConfig

INDEX = "model.safetensors.index.json"
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Tensors]


def saved_base(directory: Path) -> Path:
    """`tiny_llama` in shards."""
    tiny_llama().save_pretrained(directory, max_shard_size="20KB")
    return directory


def saved_adapter(directory: Path) -> Path:
    """A trained adapter of rank 3 on the 14 projections of `tiny_llama`."""
    trained().save_pretrained(directory)
    return directory


def saved_with_outputs(directory: Path) -> tuple[Path, torch.Tensor, Tensors]:
    """`saved_adapter`'s directory, and the logits and tensors of the model that saved it."""
    model = trained()
    model.save_pretrained(directory)
    with torch.no_grad():
        return directory, model(TOKENS).logits, model.state_dict()


def everything() -> SORSAConfig:
    """The options of `saved_adapter`, for a causal model."""
    return SORSAConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def stored(directory: Path) -> dict[str, Tensors]:
    return {path.name: load_file(path) for path in sorted(directory.glob("model*.safetensors"))}


def damaged(adapter: Path, target: Path, change: Change) -> Path:
    """A copy of a saved adapter whose tensors went through `change`."""
    shutil.copytree(adapter, target, dirs_exist_ok=True)
    save_file(change(load_file(adapter / FILE)), target / FILE)
    return target


def without(pattern: str) -> Change:
    return lambda tensors: {name: t for name, t in tensors.items() if not re.search(pattern, name)}


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


def reshaped(pattern: str) -> Change:
    return lambda tensors: {
        name: t[..., :-1].contiguous() if re.search(pattern, name) else t for name, t in tensors.items()
    }


def scaled(end: str, factor: float) -> Change:
    return lambda tensors: {name: t * factor if name.endswith(end) else t for name, t in tensors.items()}
