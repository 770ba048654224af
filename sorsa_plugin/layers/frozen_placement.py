"""Decides whether an adapter's frozen factors are parameters or buffers, and makes them one or the other; see
`factors.py` for why it matters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..plugins import manager


def launched_on_many() -> bool:
    """Whether torchrun, accelerate or a process group has announced several processes, or FSDP on one process."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return True
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def frozen_as_parameters() -> bool:
    """Whether frozen factors should be parameters, not buffers: a plug-in's answer, else `launched_on_many()`."""
    answer = manager().hook.sorsa_frozen_as_parameters()
    return launched_on_many() if answer is None else answer


class FrozenParameter(nn.Parameter):
    """A parameter that never requires grad: setting the flag does nothing.

    Training scripts set flags by name (`p.requires_grad_("sorsa_" in name)`). DDP would then wait for gradients that
    frozen factors never get. Engines that make parameters of their own from this one take its flag along.
    """

    def __new__(cls, data: torch.Tensor | None = None, requires_grad: bool = False) -> FrozenParameter:
        return super().__new__(cls, data, False)

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        pass

    def requires_grad_(self, requires_grad: bool = True) -> FrozenParameter:
        return self


def placed(tensor: torch.Tensor, as_parameter: bool) -> torch.Tensor:
    """The tensor as a frozen parameter or as a buffer, sharing its memory; itself if it is one.

    It is an `nn.Buffer`, because TRL's activation offloading moves every saved tensor that is neither that nor a
    parameter.
    """
    if isinstance(tensor, FrozenParameter if as_parameter else nn.Buffer):
        return tensor
    return FrozenParameter(tensor.detach()) if as_parameter else nn.Buffer(tensor.detach())


def freeze_again(module: nn.Module, names: tuple[str, ...]) -> None:
    """Make frozen parameters of plain ones, which torch's pickling has left in the place of some."""
    for name in names:
        parameter = module._parameters.get(name)
        if type(parameter) is nn.Parameter:
            module._parameters[name] = FrozenParameter(parameter.data)


@contextmanager
def staying_placed(module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Around code of torch that puts plain tensors in the place of some: moves, and loading by assignment.

    Parameters of an engine's own stay what they are.
    """
    parameters = [name for name in names if isinstance(module._parameters.get(name), FrozenParameter)]
    yield
    for name in names:
        if name in module._buffers:
            setattr(module, name, placed(getattr(module, name), as_parameter=False))
        elif name in parameters:
            setattr(module, name, placed(getattr(module, name), as_parameter=True))
