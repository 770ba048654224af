"""SORSA on linear layers with a quantised weight: what bitsandbytes' and torchao's kinds share; knows no library.

    W = dequantised weight,    y = base(x) + change(x),    merged: requantised(W + L R^T)

The base module multiplies as its library does. The factors are those of the dequantised weight, so nothing changes at
init. Merging rounds to few bits, which may lose more than the change: each merge reports its error.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...rank_zero import say
from .linear import SORSALinear

if TYPE_CHECKING:
    from torch import nn

    from ..layer import SORSALayer


class MergeRounding(NamedTuple):
    """The cost of storing a merged weight in few bits again, in Frobenius norms.

    Attributes:
        of_weight: ||stored - (W + change)|| / ||W + change||.
        of_change: ||stored - (W + change)|| / ||change||. Above 1, the rounding is larger than what was trained.
    """

    of_weight: float
    of_change: float

    @classmethod
    def between(cls, stored: torch.Tensor, wanted: torch.Tensor, before: torch.Tensor) -> MergeRounding:
        """Of a weight `stored` in place of `wanted`, which was `before` without the change; all three (out x in)."""
        return cls(relative(stored - wanted, wanted), relative(stored - wanted, wanted - before))


def relative(error: torch.Tensor, whole: torch.Tensor) -> float:
    """||error|| / ||whole||, of two tensors (out x in); 0 if `whole` is zero."""
    size = float(whole.norm())
    return float(error.norm()) / size if size else 0.0


class SORSAQuantisedLinear(SORSALinear):
    """A linear layer whose base stores W (out x in) in few bits.

    A kind says how to read what is stored (`dequantise`) and how to write it (`quantise`). What is stored travels as
    the parameter object, which carries its scales.

    Attributes:
        merge_error: rounding of the last merge; None while nothing is merged.
    """

    quantised = True
    merge_error: MergeRounding | None = None

    @abstractmethod
    def dequantise(self, stored: nn.Parameter) -> torch.Tensor:
        """A fresh fp32 matrix (out x in) from what `stored_weight` gives."""

    @abstractmethod
    def quantise(self, matrix: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
        """A matrix (out x in, fp32) stored with the settings of `like`, on its device and for its dtype."""

    def base_matrix(self) -> torch.Tensor:
        """The dequantised weight (out x in), fp32 and fresh."""
        return self.dequantise(self.stored_weight())

    def in_full(self, stored: nn.Parameter) -> torch.Tensor:
        """W (out x in), fp32, from what `stored_weight` gives."""
        return self.weight_state.full(self, self.dequantise(stored))

    def as_stored(self, weight: torch.Tensor, original: nn.Parameter) -> nn.Parameter:
        """The weight (out x in) quantised as `original` is. Sets `merge_error` to the cost."""
        stored = self.quantise(weight, original)
        self.merge_error = MergeRounding.between(self.dequantise(stored), weight, self.in_full(original))
        return stored

    def unmerge(self) -> None:
        super().unmerge()
        self.merge_error = None


def merge_errors(layers: Iterable[SORSALayer]) -> dict[str, MergeRounding]:
    """{layer: rounding} of the quantised layers that are merged."""
    found = {layer.name: getattr(layer, "merge_error", None) for layer in layers}
    return {name: error for name, error in found.items() if error is not None}


def warn_about_rounding(layers: Iterable[SORSALayer]) -> None:
    """Log one line per merge on the cost of quantising the merged weights again, if any are quantised."""
    say_rounding(
        "Merging stored %d weights in few bits again (merge_and_dequantize(model) keeps 16)", merge_errors(layers)
    )


def say_rounding(beginning: str, errors: dict[str, MergeRounding]) -> None:
    """Log one line: `beginning`, with the number of layers in it, and the layer whose change lost most."""
    if errors:
        name, worst = max(errors.items(), key=lambda item: (item[1].of_change, item[1].of_weight))
        of_change = f"up to {worst.of_change:.2g} times as large as the adapter's change, and " * (worst.of_change > 0)
        say(
            f"{beginning}: the rounding is %s%.2g of the weight (%s).", len(errors), of_change, worst.of_weight, name,
        )  # fmt: skip
