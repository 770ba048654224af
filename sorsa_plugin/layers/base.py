"""`AdaptedWeight`: a base module whose weight W (out x in) carries adapters: how W is read, whose tensors are whose.

Merging (`merging.py`), folding (`folding.py`) and what PEFT calls (`layer.py`) build on it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..compat.peft import BaseTunerLayer
from ..linalg.fingerprint import check, fingerprint, storage_of
from ..linalg.precision import full_precision
from .base_weight import base_weight_here, device_of, refuse_sharded, with_base_weight
from .factors import SORSAFactors, not_loaded
from .weight_state import Intact, WeightState

if TYPE_CHECKING:
    from ..config import SORSAConfig


class ReadThrough(nn.Module):
    """A module whose missing public attributes are those of its `base_layer`: models read attributes off their layers
    (Whisper: `conv1.stride`)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":  # hooks and flags belong to one module
                raise
            return getattr(self.base_layer, name)


class ResidualMaker(Protocol):
    """Makes the quantised residual of a layer from full-precision weights; `qsorsa/residual.py` has one."""

    def make(self, layer: Any, adapter_name: str) -> None:
        """For a new adapter: factorise the full-precision weight, and store the residual."""

    def settle(self, layer: Any, adapter_name: str) -> None:
        """For a loaded adapter: recognise the residual that it belongs to, or store it."""


class AdaptedWeight(ReadThrough, BaseTunerLayer):
    """A base module with adapters on its weight.

    A kind says in `base_matrix` and `delta_to_weight` how its weight reads as a matrix. A weight can also be a stack of
    matrices (experts): shapes then begin with their number.

    Args:
        base_layer: the module to adapt; kept, called and never copied.
        name: its dotted name in the model, for messages.

    Attributes:
        weight_state: what the base module stores for W; see `weight_state.py`.
        residual_maker: makes what a base of residuals is to store; None once it stores that, and on any other base.
        rounding: relative error of W as it was quantised, and with the residual quantised; None where it was not.

    Raises:
        UnsupportedLayerError: the weight is a DTensor; see `base_weight.refuse_sharded`.
    """

    if TYPE_CHECKING:  # what BaseTunerLayer provides, which nn.Module's __getattr__ hides from type checkers
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool

        def get_base_layer(self) -> Any: ...

    parameter_name = "weight"
    """The base module's attribute that is adapted."""

    quantised = False
    """Whether what the base stores is rounded to a few bits, so that writing it rounds anew."""

    foldable = False
    """Whether the kind's `forward` completes the output of a base that lacks the triplets (`additive.complete`)."""

    adapter_layer_names = ("sorsa_factors",)
    other_param_names = ("sorsa_dropout", "configs")

    weight_state: WeightState = Intact()
    residual_maker: ResidualMaker | None = None
    rounding: tuple[float, float] | None = None

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.sorsa_factors = nn.ModuleDict()
        self.sorsa_dropout = nn.ModuleDict()
        self.configs: dict[str, SORSAConfig] = {}
        self.cast_input_dtype_enabled = True  # PEFT's helper toggles it on every tuner layer
        self._disable_adapters = False
        refuse_sharded(self.base_weight(), self.parameter_path)
        with base_weight_here(self.get_base_layer()):
            *self.stack, self.out_features, self.in_features = self.base_matrix().shape

    # -- the weight --------------------------------------------------------------------------------------------------

    def base_weight(self) -> nn.Parameter:
        """The base weight as the base module holds it."""
        return getattr(self.get_base_layer(), self.parameter_name)

    @property
    def weight(self) -> torch.Tensor:
        """W, for models that read it off the layer instead of calling it (Mamba's `dt_proj.weight`): folded or not."""
        return self.get_base_layer().weight if self.merged else self.weight_state.shown(self)

    @property
    def parameter_path(self) -> str:
        """The dotted name of the adapted parameter in the base model."""
        return f"{self.name}.{self.parameter_name}"

    @abstractmethod
    def base_matrix(self) -> torch.Tensor:
        """The base weight as a matrix (out x in), a view where possible, in its own dtype and on its own device."""

    @abstractmethod
    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """A change (out x in) in the shape of the base weight."""

    def storage(self) -> str:
        """How the base weight is stored, as the fingerprint needs to know it ("float32", "4bit-nf4-64", ...)."""
        return storage_of(self.base_weight())

    def lora_layout(self) -> tuple[Any, ...] | None:
        """How PEFT's LoRA has the layer, as adapter_config.json keeps it (`files/adapter_format.py`); None: linear."""
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedWeight:
        """Take a kept weight along to another device or dtype."""
        super()._apply(fn, recurse)
        self.weight_state = self.weight_state.moved(fn)
        return self

    # -- the adapters ------------------------------------------------------------------------------------------------

    def factors(self, adapter_name: str) -> SORSAFactors:
        """The adapter's tensors.

        Raises:
            ValueError: the layer has no adapter of that name.
        """
        if adapter_name not in self.sorsa_factors:
            known = ", ".join(self.sorsa_factors) or "none"
            raise ValueError(f"{self.name} has no SORSA adapter named {adapter_name!r}; it has: {known}.")
        return self.sorsa_factors[adapter_name]  # type: ignore[return-value]

    def ready_factors(self, adapter_name: str) -> SORSAFactors:
        """The adapter's tensors, loaded and checked against the base weight.

        Raises:
            FactorsNotLoadedError, BaseMismatchError: they are not.
        """
        factors = self.factors(adapter_name)
        if not factors.base_checked and not torch.compiler.is_compiling():
            if factors.pending:
                raise not_loaded(self.name, awaited=self.configs[adapter_name].factors_from_file)
            self.check_base(adapter_name)
        return factors

    def get_factors(self, adapter_name: str = "default") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U (out x r), S (r) and V (in x r) as they are now, fp32, differentiable with respect to the trained offsets;
        of a stack, each begins with the number of matrices.

        Raises:
            ValueError: the layer has no adapter of that name.
            FactorsNotLoadedError, BaseMismatchError: see `ready_factors`.
        """
        return self.ready_factors(adapter_name).get()

    def set_factors(self, adapter_name: str, U: torch.Tensor, S: torch.Tensor, V: torch.Tensor) -> None:
        """Make U, S, V the adapter's current factors (one fp32 rounding); shapes as `get_factors` returns them.

        Raises:
            ValueError: a shape differs, or the layer has no adapter of that name.
        """
        self.ready_factors(adapter_name).set(U, S, V)

    @full_precision()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The adapter's change L R^T, fp32, in the shape of the base weight."""
        L, R = self.ready_factors(adapter_name).low_rank_pair()
        return self.delta_to_weight(L @ R.mT)

    def awaits_file(self, adapter_name: str) -> bool:
        """Whether a new adapter's tensors come from a file; alike on all processes, whatever weights each has."""
        config = self.configs[adapter_name]
        # a config that another adapter here has (TRL adds its "ref" so) announces a copy of that, not another file
        shared = any(config is other for name, other in self.configs.items() if name != adapter_name)
        return config.factors_from_file and not shared

    @with_base_weight
    def check_base(self, adapter_name: str) -> None:
        """Compare the adapter's fingerprint with the base weight; deferred while the weight is on the meta device,
        sharded, or merged.

        Raises:
            BaseMismatchError: the adapter was made from another weight.
        """
        factors, config = self.factors(adapter_name), self.configs[adapter_name]
        matrix = self.base_matrix()
        sharded = hasattr(matrix, "device_mesh") or 0 in (matrix.numel(), factors.fingerprint.numel())
        if matrix.is_meta or sharded or factors.pending or self.merged or matrix.device != factors.fingerprint.device:
            return
        with self.weight_state.intact_weight(self):
            saved = factors.fingerprint
            if config.residual_base and not self.quantised:  # of the residual, and this is the full-precision weight
                saved = saved + fingerprint(factors.initial_matrix())
            check(saved, self.base_matrix(), config.storage_of(self.name), self.storage(), self.name)
        factors.base_checked = True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        """Give awaited tensors that are in the file a place beside the base weight, wherever the file was read to."""
        device = device_of(self.get_base_layer(), self.base_weight())
        if not local_metadata.get("assign_to_params_buffers", False) and device.type != "meta":
            for name in self.sorsa_factors:
                factors = self.factors(name)
                if factors.pending and factors.names_in(state_dict, f"{prefix}sorsa_factors.{name}."):
                    factors.materialise(device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __repr__(self) -> str:
        return "sorsa." + super().__repr__()
