"""The convolution kinds: nn.Conv1d, nn.Conv2d, nn.Conv3d."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from ...plugins import hookimpl
from ..layer import SORSALayer
from ..storage import is_quantised
from .additive import AdditiveLayer
from .lending import LendingLayer

if TYPE_CHECKING:
    from ...config import SORSAConfig

CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POINTWISE: dict[int, Any] = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
"""{number of dimensions of the weight: the convolution}"""


class _Convolution(SORSALayer):
    """A convolution whose W (out x in/groups x kernel) reads as the matrix (out x in/groups * kernel)."""

    def base_matrix(self) -> torch.Tensor:
        return self.get_base_layer().weight.flatten(1)

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.reshape(self.get_base_layer().weight.shape)


class SORSAConv(_Convolution, AdditiveLayer):
    """SORSA on a convolution: R^T is one with 2r output channels, L one of kernel 1 from these to the output."""

    def lora_layout(self) -> tuple[Any, ...]:
        base = self.get_base_layer()
        if base.padding_mode != "zeros" or any(step != 1 for step in base.dilation):
            return ("unsupported", "a convolution with dilation or padding that PEFT's LoRA leaves out")
        return ("convolution", *base.weight.shape[1:])

    def add_change(self, y: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """y + change(x) for y (... x out x positions) and x (... x in x positions), in the dtype of y."""
        base = self.get_base_layer()
        L, R = self.ready_factors(adapter_name).low_rank_pair()
        shape = base.weight.shape
        with torch.autocast(y.device.type, enabled=False):
            kernels = R.mT.reshape(-1, *shape[1:]).to(y.dtype)
            dropped = self.sorsa_dropout[adapter_name](x).to(y.dtype)
            hidden = base._conv_forward(dropped, kernels, None)  # the base's stride, padding and dilation
            return y + POINTWISE[len(shape)](hidden, L.reshape(*L.shape, *(1,) * (len(shape) - 2)).to(y.dtype))


class SORSALendingConv(_Convolution, LendingLayer):
    """SORSA on a grouped convolution, or one with a forward of its own: it convolves with the changed weight."""

    def lora_layout(self) -> tuple[Any, ...]:
        return ("unsupported", "a grouped convolution, or one with a forward of its own, where LoRA means another")


@hookimpl
def sorsa_layer(target: nn.Module, config: SORSAConfig) -> type[SORSALayer] | None:
    """The kinds of this file."""
    if not isinstance(target, CLASSES) or is_quantised(target):
        return None
    plain = type(target).forward in [kind.forward for kind in CLASSES]
    return SORSAConv if plain and target.groups == 1 else SORSALendingConv
