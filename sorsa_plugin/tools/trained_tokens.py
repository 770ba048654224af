"""Finds embeddings of which some rows are trained in full (`trainable_token_indices`), as PEFT names and ties them."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..compat.peft import TrainableTokensWrapper
from .empty_adapter import ADAPTER

TRAINED_TOKENS = ".token_adapter.trainable_tokens_delta"
"""The new rows' name in an adapter file is the embedding's name followed by this."""


class TrainedTokens(NamedTuple):
    """Which rows of a module's weight are trained."""

    owner: str
    """The module under whose name the rows are saved: the module itself, or one that it is tied to."""
    tokens: tuple[int, ...]


def trained_tokens(model: nn.Module) -> dict[str, TrainedTokens]:
    """{module: its trained rows} of a base model whose embeddings PEFT has wrapped."""
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, TrainableTokensWrapper)}
    names = {id(wrapper.token_adapter): name for name, wrapper in wrappers.items()}
    owners = {name: w.token_adapter.tied_adapter or w.token_adapter for name, w in wrappers.items()}
    return {
        name: TrainedTokens(names[id(owner)], tuple(owner.token_indices[ADAPTER])) for name, owner in owners.items()
    }
