"""`SORSALayer`: a base module with SORSA adapters on its weight, as PEFT handles it. Its kinds are in `kinds`.

    y = base(x) + sum over active adapters of (dropout(x) R) L^T        (the pair L, R of `factors.py`)

The base module is called as it is. Its weight is written only while adapters are merged. The original is then kept, so
that unmerging restores it bit for bit.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..files.adapter_format import OFFSETS
from ..linalg.svd import require_triplets
from .base_weight import with_base_weight
from .factors import SORSAFactors
from .folding import fold_layer
from .frozen_placement import frozen_as_parameters
from .merging import MergeableWeight

if TYPE_CHECKING:
    from ..config import SORSAConfig

_living: weakref.WeakValueDictionary[int, SORSALayer] = weakref.WeakValueDictionary()
"""Every SORSA layer of the process, by number."""

_numbers = itertools.count()


def live_layers() -> list[SORSALayer]:
    """Every SORSA layer of the process. The first step of an optimizer finds here the factors that nobody attached."""
    # valuerefs() copies the references at once: other threads may be making layers
    return [layer for reference in _living.valuerefs() if (layer := reference()) is not None]


def sorsa_layers(model: nn.Module) -> list[SORSALayer]:
    """The SORSA layers of a model, in module order."""
    return [module for module in model.modules() if isinstance(module, SORSALayer)]


class SORSALayer(MergeableWeight):
    """A base module whose weight W (out x in) carries SORSA adapters (arXiv 2409.00055).

    A kind says in `base_matrix` and `delta_to_weight` how its weight reads as a matrix, and in `forward` how the change
    joins the output. A weight can also be a stack of E matrices (experts). Shapes then begin with E.

    Args:
        base_layer: the module to adapt; kept, called and never copied.
        name: its dotted name in the model, for messages.

    Raises:
        UnsupportedLayerError: the weight is a DTensor; see `base_weight.refuse_sharded`.
    """

    adapters_made = 0
    """Number of adapters made by all layers of the process. An optimizer's step sees by it that there are new ones."""

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.register_load_state_dict_post_hook(_check_after_load)
        self.number = next(_numbers)  # orders the live layers alike in all processes of a run
        self.family = object()  # all layers of a model share one
        self._frozen_by_hand: list[tuple[str, str]] = []  # (adapter, offset), while adapters are disabled
        self.changed = 0  # value of `adapters_made` when the layer last got an adapter
        _living[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = next(_numbers)
        _living[self.number] = self
        self._note_change()

    def _note_change(self) -> None:
        SORSALayer.adapters_made += 1
        self.changed = SORSALayer.adapters_made

    @with_base_weight
    def update_layer(self, adapter_name: str, rank: int, config: SORSAConfig) -> None:
        """Add an adapter of the given rank, without values yet: `initialise` or a file gives it some.

        Raises:
            RankError: the rank is below 1 or larger than the weight's smaller side.
            FoldError: another adapter is folded into the weight, or the base stores the residual of another rank.
        """
        self.weight_state.refuse_beside(self, adapter_name, rank)
        matrix = self.base_matrix()
        require_triplets(rank, tuple(matrix.shape), self.name)
        self.configs[adapter_name] = config
        device = torch.device("meta") if self.awaits_file(adapter_name) else matrix.device
        factors = SORSAFactors(self.out_features, self.in_features, rank, device, tuple(self.stack))
        factors.place_frozen(frozen_as_parameters())
        self.sorsa_factors[adapter_name] = factors
        self._note_change()
        self.add_dropout(adapter_name, config.sorsa_dropout)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def add_dropout(self, adapter_name: str, probability: float) -> None:
        """Give an adapter its dropout, active only if the layer is in training mode."""
        dropout = nn.Dropout(probability) if probability > 0 else nn.Identity()
        self.sorsa_dropout[adapter_name] = dropout.train(self.training)

    def fold(self) -> None:
        """Store W - U0 S0 V0^T in the base layer; see `fold_layer`.

        Raises:
            FoldError: see `check_foldable`.
        """
        fold_layer(self)

    def unfold(self) -> None:
        """Put W back, bit for bit. Does nothing to a layer that is not folded.

        Raises:
            FoldError: the adapter is merged into the layer, or the base stores a residual for good.
        """
        self.weight_state.restore(self)

    def trained(self) -> dict[str, SORSAFactors]:
        """{name: tensors} of the active adapters that train; empty while adapters are disabled."""
        if self._disable_adapters:
            return {}
        # read from the dictionaries: every optimizer step asks every layer, and attributes of modules are slow
        factors: Any = self._modules["sorsa_factors"]._modules  # type: ignore[union-attr]
        active = ((name, factors[name]) for name in self.active_adapters if name in factors)
        return {name: tensors for name, tensors in active if tensors.trains}

    # -- methods that PEFT calls ------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's method: what is activated trains, whatever was frozen before."""
        self._frozen_by_hand.clear()
        super().set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """PEFT's method, which makes all of an enabled adapter train; here what was frozen before stays frozen."""
        if not enabled and not self._disable_adapters:
            active = [name for name in self.active_adapters if name in self.sorsa_factors]
            offsets = [(name, part, self.factors(name).get_parameter(part)) for name in active for part in OFFSETS]
            self._frozen_by_hand = [(name, part) for name, part, offset in offsets if not offset.requires_grad]
        frozen = list(self._frozen_by_hand)
        super().enable_adapters(enabled)
        for name, part in frozen if enabled else []:
            if name in self.sorsa_factors:
                self.factors(name).get_parameter(part).requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it is merged, its change is taken out of the weight first.

        Raises:
            FoldError: the base stores a residual that this adapter alone completes.
        """
        self.weight_state.refuse_to_delete(self, adapter_name)  # before anything is undone
        if adapter_name in self.merged_adapters:
            others = [name for name in self.merged_adapters if name != adapter_name]
            self.unmerge()
            if others:
                self.merge(adapter_names=others)
        self.weight_state.before_delete(self, adapter_name)
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter without casting it: PEFT's own method also casts to the base's dtype."""
        target = device or self.base_matrix().device
        if adapter_name in self.sorsa_factors and not self.factors(adapter_name).pending and target.type != "meta":
            self.sorsa_factors[adapter_name].to(target)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` is right here: it takes every layer for a linear one that keeps its name."""
        renamed = adapter_name in self.configs and self.name in self.configs[adapter_name].lora_layouts
        return self.lora_layout() is None and not renamed

    def adapters_in_use(self) -> list[str]:
        """The adapters whose change joins the output now; none while adapters are disabled or merged.

        Raises:
            MergeError: see `refuse_lost_merge`.
        """
        if self.merged:
            self.refuse_lost_merge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.sorsa_factors]


def _check_after_load(layer: SORSALayer, incompatible_keys: Any) -> None:
    """After load_state_dict: check the base weight at once if possible, so that a wrong one is refused on loading."""
    for name in layer.sorsa_factors:
        factors = layer.factors(name)
        if not factors.base_checked and not factors.pending:
            if layer.configs[name].residual_base and layer.residual_maker is not None:
                layer.residual_maker.settle(layer, name)
            layer.check_base(name)
    if not layer.merged:
        layer.weight_state.rewrite(layer)
