"""`AdaptedWeight`: a base module whose weight W (out x in) carries adapters: how W is read, whose tensors are whose.

Merging (`merging.py`), folding (`folding.py`) and the methods that PEFT calls (`layer.py`) build on it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..compat.peft import BaseTunerLayer
from ..files.adapter_format import FROZEN
from ..linalg.fingerprint import check, fingerprint, storage_of
from ..linalg.precision import full_precision
from ..linalg.svd import product
from ..linalg.triplet_check import check_orthonormal, check_triplets
from .base_weight import base_weight_here, device_of, refuse_sharded, with_base_weight
from .factors import SORSAFactors, not_loaded
from .weight_state import Intact, WeightState

if TYPE_CHECKING:
    from ..config import SORSAConfig


class ReadThrough(nn.Module):
    """A module that takes the public attributes it lacks from its `base_layer`.

    Models read attributes off their layers (Whisper: `conv1.stride`).
    """

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
        """For a loaded adapter: recognise the residual that it belongs to in the base, or store that residual."""


class AdaptedWeight(ReadThrough, BaseTunerLayer):
    """A base module with adapters on its weight.

    A kind says in `base_matrix` and `delta_to_weight` how its weight reads as a matrix (out x in). A weight can also be
    a stack of E matrices (experts). Every shape below then begins with E.

    Args:
        base_layer: the module to adapt; kept, called and never copied.
        name: its dotted name in the model, for messages.

    Attributes:
        weight_state: what the base module stores for W; see `weight_state.py`.
        residual_maker: makes the residual that the base is to store (QSORSA); None once it stores that, and on other
            bases.
        rounding: relative errors of W: as plain quantisation has it, and with the residual quantised. None if no
            residual was made.

    Raises:
        UnsupportedLayerError: the weight is a DTensor; see `base_weight.refuse_sharded`.
    """

    if TYPE_CHECKING:  # BaseTunerLayer provides these; nn.Module's __getattr__ hides them from type checkers
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool

        def get_base_layer(self) -> Any: ...

    parameter_name = "weight"
    """The attribute of the base module that is adapted."""

    quantised = False
    """Whether the base stores W in a few bits, so that each write rounds again."""

    foldable = False
    """Whether the kind's `forward` adds the triplets that a folded base lacks (`additive.complete`)."""

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
        """The base weight as the base module holds it, in its own shape, dtype and device."""
        return getattr(self.get_base_layer(), self.parameter_name)

    @property
    def weight(self) -> torch.Tensor:
        """W in the shape and dtype of the base weight, folded or not.

        For models that read the weight off the layer instead of calling it (Mamba's `dt_proj.weight`).
        """
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
        """How the base weight is stored, as the fingerprint names it ("float32", "4bit-nf4-64", ...)."""
        return storage_of(self.base_weight())

    def lora_layout(self) -> tuple[Any, ...] | None:
        """Where PEFT's LoRA keeps this layer's pair, as adapter_config.json notes it; None for a linear layer.

        The layouts are listed in `files/adapter_format.py`.
        """
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedWeight:
        """Take the kept weight of a folded layer along to another device or dtype."""
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
            ValueError: the layer has no adapter of that name.
            FactorsNotLoadedError: the tensors have not arrived.
            BaseMismatchError, IncompleteAdapterError: see `check_base`.
        """
        factors = self.factors(adapter_name)
        if not factors.base_checked and not torch.compiler.is_compiling():
            if factors.pending:
                raise not_loaded(self.name, awaited=self.configs[adapter_name].factors_from_file)
            self.check_base(adapter_name)
        return factors

    def get_factors(self, adapter_name: str = "default") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The current U (out x r), S (r) and V (in x r), fp32, differentiable with respect to the trained offsets.

        Of a stack, each begins with the number of matrices.

        Raises:
            ValueError: the layer has no adapter of that name.
            FactorsNotLoadedError, BaseMismatchError: see `ready_factors`.
        """
        return self.ready_factors(adapter_name).get()

    def set_factors(self, adapter_name: str, U: torch.Tensor, S: torch.Tensor, V: torch.Tensor) -> None:
        """Make U (out x r), S (r) and V (in x r) the adapter's current factors, up to one fp32 rounding.

        Of a stack, each begins with the number of matrices.

        Raises:
            ValueError: a shape differs, or the layer has no adapter of that name.
            FactorsNotLoadedError, BaseMismatchError: see `ready_factors`.
        """
        self.ready_factors(adapter_name).set(U, S, V)

    @full_precision()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The adapter's change L R^T, fp32, in the shape of the base weight.

        Raises:
            ValueError: the layer has no adapter of that name.
            FactorsNotLoadedError, BaseMismatchError: see `ready_factors`.
        """
        L, R = self.ready_factors(adapter_name).low_rank_pair()
        return self.delta_to_weight(L @ R.mT)

    def awaits_file(self, adapter_name: str) -> bool:
        """Whether a new adapter's tensors come from a file. All processes agree, whichever weights each of them has."""
        config = self.configs[adapter_name]
        # TRL adds its "ref" with the config of an adapter that is here: a copy of that adapter, not another file
        shared = any(config is other for name, other in self.configs.items() if name != adapter_name)
        return config.factors_from_file and not shared

    def check_base(self, adapter_name: str) -> None:
        """Compare the adapter's fingerprint, and its frozen factors, with the base weight.

        Does nothing yet while the weight is on the meta device, on another device, sharded, or merged.

        Raises:
            BaseMismatchError: the adapter was made from another weight.
            IncompleteAdapterError: its frozen factors are no singular triplets of the weight.
        """
        factors = self.factors(adapter_name)
        tensors = {name: getattr(factors, name) for name in FROZEN}
        if not factors.pending and self._compare(adapter_name, tensors):
            factors.base_checked = True

    def check_file(self, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """The same for tensors of a state dict ({name in `FROZEN`: tensor}) before any layer takes one.

        Raises:
            BaseMismatchError, IncompleteAdapterError: see `check_base`.
        """
        without_values = any(tensor.is_meta for tensor in tensors.values())
        # a residual maker finds out whether the base stores this adapter's residual
        if self.residual_maker is None and not without_values:
            device = self.base_weight().device
            if self._compare(adapter_name, {name: tensor.to(device) for name, tensor in tensors.items()}):
                self.factors(adapter_name).accept(tensors["fingerprint"])

    @with_base_weight
    def _compare(self, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether tensors were compared with the base weight: now is not always the time."""
        config, matrix, saved = self.configs[adapter_name], self.base_matrix(), tensors["fingerprint"]
        sharded = any(hasattr(tensor, "device_mesh") or not tensor.numel() for tensor in (matrix, *tensors.values()))
        if matrix.is_meta or sharded or self.merged or matrix.device != saved.device:
            return False
        initial = tensors["U0"], tensors["S0"], tensors["V0"]
        residual = config.residual_base and self.quantised
        with self.weight_state.intact_weight(self):
            matrix = self.base_matrix()
            if config.residual_base and not residual:  # it is of the residual, and W is here in full precision
                saved = saved + fingerprint(product(*initial))
            then, now = config.storage_of(self.name), self.storage()
            check(saved, matrix, then, now, self.name)
            if config.init_weights:  # else they are random
                check_orthonormal(initial[0], initial[2], self.name)
                if not residual:
                    check_triplets(*initial, matrix, then, now, self.name)
        return True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        """Give awaited tensors that the file holds storage on the base weight's device, wherever the file was read
        to."""
        device = device_of(self.get_base_layer(), self.base_weight())
        if not local_metadata.get("assign_to_params_buffers", False) and device.type != "meta":
            for name in self.sorsa_factors:
                factors = self.factors(name)
                if factors.pending and factors.names_in(state_dict, f"{prefix}sorsa_factors.{name}."):
                    factors.materialise(device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __repr__(self) -> str:
        return "sorsa." + super().__repr__()
