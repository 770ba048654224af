"""`SORSALayer`: a base module with SORSA adapters on its weight; its kinds are in files of their own.

    y = base(x) + sum over active adapters of (dropout(x) R) L^T        (the pair L, R of `factors.py`)

The base module is called as it is and its weight is never written, except while adapters are merged; then the
original is kept, so that unmerging restores it bit for bit.
"""

from __future__ import annotations

import itertools
import weakref
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..linalg.fingerprint import check, fingerprint, storage_of
from ..linalg.precision import full_precision
from ..linalg.svd import require_triplets
from .base import ReadThrough
from .base_weight import base_weight_here, device_of, refuse_sharded, with_base_weight
from .factors import SORSAFactors, frozen_as_parameters, not_loaded
from .folding import Foldable, intact_weight, refold
from .merging import Mergeable

if TYPE_CHECKING:
    from ..config import SORSAConfig

_living: weakref.WeakValueDictionary[int, SORSALayer] = weakref.WeakValueDictionary()
"""Every SORSA layer of the process, by its number."""

_numbers = itertools.count()


def live_layers() -> list[SORSALayer]:
    """Every SORSA layer of the process: how the first step of an optimizer finds factors that nobody attached."""
    # a list of references is made at once, while other threads may make layers
    return [layer for reference in _living.valuerefs() if (layer := reference()) is not None]


class SORSALayer(Mergeable, Foldable, ReadThrough, BaseTunerLayer):
    """A base module whose weight W (out x in) carries SORSA adapters (arXiv 2409.00055).

    A kind says in `base_matrix` and `delta_to_weight` how its weight reads as a matrix, and in `forward` how the
    change joins the output. A weight can also be a stack of matrices (experts): shapes then begin with their number.

    Args:
        base_layer: the module to adapt; kept, called and never copied.
        name: its dotted name in the model, for messages.

    Raises:
        UnsupportedLayerError: the weight is a DTensor; see `offloading.refuse_sharded`.
    """

    if TYPE_CHECKING:  # what BaseTunerLayer provides, which nn.Module's __getattr__ hides from type checkers
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool

        def get_base_layer(self) -> Any: ...

    parameter_name = "weight"
    """The base module's attribute that is adapted."""

    adapters_made = 0
    """By all layers of the process: an optimizer's step tells by it that there are new ones."""

    adapter_layer_names = ("sorsa_factors",)
    other_param_names = ("sorsa_dropout", "configs")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.sorsa_factors = nn.ModuleDict()
        self.sorsa_dropout = nn.ModuleDict()
        self.configs: dict[str, SORSAConfig] = {}
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True  # PEFT's helper toggles it on every tuner layer
        self._disable_adapters = False
        self._original: list[nn.Parameter] = []  # see `merging.py`
        refuse_sharded(self.base_weight(), self.parameter_path)
        with base_weight_here(self.get_base_layer()):
            *self.stack, self.out_features, self.in_features = self.base_matrix().shape
        self.register_load_state_dict_post_hook(_check_after_load)
        self.number = next(_numbers)  # an order of the live layers that is alike in all processes of a run
        self.family = object()  # the same in all layers of a model
        self.changed = 0  # what `adapters_made` was when the layer last got an adapter
        _living[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = next(_numbers)
        _living[self.number] = self
        self._note_change()

    def _note_change(self) -> None:
        SORSALayer.adapters_made += 1
        self.changed = SORSALayer.adapters_made

    def base_weight(self) -> nn.Parameter:
        """The base weight as the base module holds it."""
        return getattr(self.get_base_layer(), self.parameter_name)

    @property
    def weight(self) -> torch.Tensor:
        """W, for models that read it off the layer instead of calling it (Mamba's `dt_proj.weight`): folded or not."""
        if self.folded is not None and self.folded.intact is not None and not self.merged:
            return self.folded.intact
        return self.get_base_layer().weight

    @property
    def parameter_path(self) -> str:
        """The dotted name of the adapted parameter in the base model."""
        return f"{self.name}.{self.parameter_name}"

    @abstractmethod
    def base_matrix(self) -> torch.Tensor:
        """The base weight as a matrix (out x in), a view where possible, in its own dtype and on its own device."""

    def storage(self) -> str:
        """How the base weight is stored, as the fingerprint needs to know it ("float32", "4bit-nf4-64", ...)."""
        return storage_of(self.base_weight())

    @abstractmethod
    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """A change (out x in) in the shape of the base weight."""

    def lora_layout(self) -> tuple[Any, ...] | None:
        """What `adapter_format.py` needs to know of the layer, as adapter_config.json keeps it; None: it is linear."""
        return None

    # -- adapters ---------------------------------------------------------------------------------------------------

    @with_base_weight
    def update_layer(self, adapter_name: str, rank: int, config: SORSAConfig) -> None:
        """Add an adapter of the given rank, still without values: `initialise` gives it some, or a file does.

        Raises:
            RankError: the rank is larger than the weight's smaller side.
            FoldError: another adapter is folded into the weight.
        """
        self.refuse_beside_folded(adapter_name, rank)
        matrix = self.base_matrix()
        require_triplets(rank, tuple(matrix.shape), self.name)
        self.configs[adapter_name] = config
        device = torch.device("meta") if self.awaits_file(adapter_name) else matrix.device
        factors = SORSAFactors(self.out_features, self.in_features, rank, device, tuple(self.stack))
        factors.place_frozen(frozen_as_parameters())
        self.sorsa_factors[adapter_name] = factors
        self._note_change()
        dropout = nn.Dropout(config.sorsa_dropout) if config.sorsa_dropout > 0 else nn.Identity()
        self.sorsa_dropout[adapter_name] = dropout.train(self.training)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def awaits_file(self, adapter_name: str) -> bool:
        """Whether a new adapter's tensors come from a file; alike on all processes, whatever weights each has."""
        config = self.configs[adapter_name]
        # a config that another adapter here has (TRL adds its "ref" so) announces a copy of that, not another file
        shared = any(config is other for name, other in self.configs.items() if name != adapter_name)
        return config.factors_from_file and not shared

    def factors(self, adapter_name: str) -> SORSAFactors:
        """The adapter's tensors.

        Raises:
            ValueError: the layer has no adapter of that name.
        """
        if adapter_name not in self.sorsa_factors:
            known = ", ".join(self.sorsa_factors) or "none"
            raise ValueError(f"{self.name} has no SORSA adapter named {adapter_name!r}; it has: {known}.")
        return self.sorsa_factors[adapter_name]  # type: ignore[return-value]

    def get_factors(self, adapter_name: str = "default") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U (out x r), S (r) and V (in x r) as they are now, differentiable with respect to the trained offsets."""
        return self.ready_factors(adapter_name).get()

    def set_factors(self, adapter_name: str, U: torch.Tensor, S: torch.Tensor, V: torch.Tensor) -> None:
        """Make U, S, V the adapter's current factors (one fp32 rounding); shapes as `get_factors` returns them."""
        self.ready_factors(adapter_name).set(U, S, V)

    def trained(self) -> dict[str, SORSAFactors]:
        """The active adapters that train; none while adapters are disabled."""
        if self._disable_adapters:
            return {}
        # by the dictionaries: every optimizer step asks every layer, and modules look attributes up slowly
        factors: Any = self._modules["sorsa_factors"]._modules  # type: ignore[union-attr]
        active = ((name, factors[name]) for name in self.active_adapters if name in factors)
        return {name: tensors for name, tensors in active if tensors._parameters["dU"].requires_grad}

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
        with intact_weight(self):
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

    # -- what PEFT calls --------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._keep_frozen()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; where it is merged, its change leaves the weight with it."""
        if adapter_name in self.merged_adapters:
            others = [name for name in self.merged_adapters if name != adapter_name]
            self.unmerge()
            if others:
                self.merge(adapter_names=others)
        self.leave_folded(adapter_name)
        super().delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        for name in self.sorsa_factors:
            self.factors(name).keep_frozen()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter, and never cast it: PEFT's own also rounds to the base's dtype."""
        target = device or self.base_matrix().device
        if adapter_name in self.sorsa_factors and not self.factors(adapter_name).pending and target.type != "meta":
            self.sorsa_factors[adapter_name].to(target)

    @full_precision()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The adapter's change L R^T, fp32, in the shape of the base weight."""
        L, R = self.ready_factors(adapter_name).low_rank_pair()
        return self.delta_to_weight(L @ R.mT)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` is right, which takes every layer for a linear one that keeps its name."""
        renamed = adapter_name in self.configs and self.name in self.configs[adapter_name].lora_layouts
        return self.lora_layout() is None and not renamed

    def adapters_in_use(self) -> list[str]:
        """The adapters whose change joins the output now: none while disabled or merged.

        Raises:
            MergeError: see `refuse_lost_merge`.
        """
        if self.merged:
            self.refuse_lost_merge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.sorsa_factors]

    def __repr__(self) -> str:
        return "sorsa." + super().__repr__()


def _check_after_load(layer: SORSALayer, incompatible_keys: Any) -> None:
    """After load_state_dict: compare the base at once where it can be, so that a wrong one is refused on loading."""
    from ..qsorsa.residual import settle_loaded

    for name in layer.sorsa_factors:
        factors = layer.factors(name)
        if not factors.base_checked and not factors.pending:
            if layer.configs[name].residual_base and layer.quantised and layer.folded is None:
                settle_loaded(layer, name)
            layer.check_base(name)
    if layer.folded is not None and not layer.merged:
        refold(layer)
