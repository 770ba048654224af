"""SORSA on linear layers whose weight is quantised: what bitsandbytes' and torchao's kinds have in common.

    W = dequantised weight,    y = base(x) + change(x),    merged: requantised(W + L R^T)

The base module multiplies as its library does it; the factors are those of the dequantised weight, so nothing changes
at init. Merging rounds to few bits what may be smaller than the rounding: each merge reports its error.
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
    """What storing a merged weight again in few bits cost, in Frobenius norms.

    Attributes:
        of_weight: ||stored - (W + change)|| / ||W + change||.
        of_change: ||stored - (W + change)|| / ||change||; above 1, the rounding is larger than what was trained.
    """

    of_weight: float
    of_change: float

    @classmethod
    def between(cls, stored: torch.Tensor, wanted: torch.Tensor, before: torch.Tensor) -> MergeRounding:
        """Of a weight `stored` for the one `wanted`, which was `before` without the change; of one shape."""
        return cls(relative(stored - wanted, wanted), relative(stored - wanted, wanted - before))


def relative(error: torch.Tensor, whole: torch.Tensor) -> float:
    """||error|| / ||whole||; 0 where there is nothing to lose."""
    size = float(whole.norm())
    return float(error.norm()) / size if size else 0.0


class SORSAQuantisedLinear(SORSALinear):
    """A linear layer whose base stores W (out x in) in few bits.

    A kind says how that is read (`dequantise`) and written (`quantise`); what is stored travels as the parameter
    object, which carries its scales.

    Attributes:
        merge_error: of the last merge; None while nothing is merged.
    """

    quantised = True
    merge_error: MergeRounding | None = None

    @abstractmethod
    def dequantise(self, stored: nn.Parameter) -> torch.Tensor:
        """What `stored_weight` gives as a fresh fp32 matrix (out x in)."""

    @abstractmethod
    def quantise(self, matrix: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
        """A matrix (out x in, fp32) stored with the settings, on the device and for the dtype of another."""

    def base_matrix(self) -> torch.Tensor:
        """The dequantised weight (out x in), fp32 and fresh."""
        return self.dequantise(self.stored_weight())

    def in_full(self, stored: nn.Parameter) -> torch.Tensor:
        return self.weight_state.full(self, self.dequantise(stored))

    def as_stored(self, weight: torch.Tensor, original: nn.Parameter) -> nn.Parameter:
        """The weight quantised as `original` is; notes what that costs."""
        stored = self.quantise(weight, original)
        self.merge_error = MergeRounding.between(self.dequantise(stored), weight, self.in_full(original))
        return stored

    def unmerge(self) -> None:
        super().unmerge()
        self.merge_error = None


def merge_errors(layers: Iterable[SORSALayer]) -> dict[str, MergeRounding]:
    """{layer: what storing its merged weight in few bits cost} of the quantised layers that are merged."""
    found = {layer.name: getattr(layer, "merge_error", None) for layer in layers}
    return {name: error for name, error in found.items() if error is not None}


def warn_about_rounding(layers: Iterable[SORSALayer]) -> None:
    """Say once per merge what quantising the merged weights again cost, if anything was."""
    say_rounding(
        "Merging stored %d weights in few bits again (merge_and_dequantize(model) keeps 16)", merge_errors(layers)
    )


def say_rounding(beginning: str, errors: dict[str, MergeRounding]) -> None:
    """Log one line: `beginning`, with the number of layers in it, and the layer whose change suffered most."""
    if errors:
        name, worst = max(errors.items(), key=lambda item: (item[1].of_change, item[1].of_weight))
        of_change = f"up to {worst.of_change:.2g} times as large as the adapter's change, and " * (worst.of_change > 0)
        say(
            f"{beginning}: the rounding is %s%.2g of the weight (%s).", len(errors), of_change, worst.of_weight, name,
        )  # fmt: skip
