"""A module that answers for the one it wraps: models read attributes off their layers (Whisper: `conv1.stride`)."""

from __future__ import annotations

from typing import Any

from torch import nn


class ReadThrough(nn.Module):
    """A module whose missing public attributes are those of its `base_layer`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":  # hooks and flags belong to one module
                raise
            return getattr(self.base_layer, name)
