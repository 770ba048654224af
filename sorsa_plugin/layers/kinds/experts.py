"""Parameters named by `target_parameters`: matrices, and the stacks of experts of mixture-of-experts models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedLayerError
from .lending import LendingLayer


class ParamWrapper(LendingLayer):
    """SORSA on one parameter of a module: a matrix, or a stack of E matrices, each with its own triplets.

    The factors of a stack are stacked: U (E x out x r), S (E x r), V (E x in x r). Several parameters of one module
    make nested wrappers. PEFT finds wrappers by the name of this class.

    Args:
        base_layer: the module, or another parameter's wrapper of it.
        name: the parameter's dotted name, for messages.
        parameter_name: its attribute name in the module.

    Raises:
        UnsupportedLayerError: the parameter has neither two nor three dimensions.
    """

    def __init__(self, base_layer: nn.Module, name: str, parameter_name: str) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, name)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper has not, the module has: models read more of a router or a stack than the adapted parameter.

        Raises:
            AttributeError: neither has it.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet, or not any more
                raise
            return getattr(self.base_layer, name)

    @property
    def parameter_path(self) -> str:
        return self.name

    def lora_layout(self) -> tuple[Any, ...]:
        return ("parameter", self.name)

    def base_matrix(self) -> torch.Tensor:
        """The parameter as a matrix (out x in) or a stack (E x out x in), a view.

        Raises:
            UnsupportedLayerError: it has neither two nor three dimensions.
        """
        weight = self.base_weight()
        if weight.ndim not in (2, 3):
            raise UnsupportedLayerError(
                f"The parameter {self.name} has shape {tuple(weight.shape)}; expected a matrix or a stack of matrices. "
                "Take it out of target_parameters."
            )
        return self.delta_to_weight(weight)

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """A change (out x in) or (E x out x in) in the shape of the parameter.

        Experts are stored (E x out x in), or (E x in x out) if their module says so (`is_transposed`).
        """
        stored_in_out = getattr(self.get_base_layer(), "is_transposed", False)
        return delta.mT if stored_in_out and delta.ndim == 3 else delta

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without this wrapper and those inside it; PEFT calls this."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        inner: Any = self.base_layer
        if isinstance(inner, ParamWrapper):
            inner = inner.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        self._original.clear()  # last: if anything above fails, nothing is lost
        return inner
