"""QSORSA: a quantised base that stores Q(W_r), the residual W_r = W - U0 S0 V0^T of the full-precision weight W.

    y = x Q(W_r)^T + ((x V) * S) U^T,    disabled: the same with U0, S0, V0

The largest triplets of W, which a quantised base would round, are in the adapter at fp32, so what is rounded is smaller
(as QPiSSA does it for LoRA, arXiv 2404.02948). This is the folded form of `folding.py` for good: there is no W to put
back, and the base alone is not the model. Like any other adapter, a trained one also works on the full-precision model:
y = x W^T + (x R) L^T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from torch import nn

from ..config import SORSAConfig
from ..errors import BaseMismatchError, FoldError
from ..layers.kinds.quantised import relative
from ..layers.layer import SORSALayer, sorsa_layers
from ..layers.weight_state import Residual
from ..linalg.fingerprint import distance, fingerprint, same_storage_limit
from ..linalg.svd import factorise
from ..rank_zero import say
from .full_precision_weights import FullPrecisionWeights, Source, full_precision_weights, source_of
from .save_residual import FOLDER

if TYPE_CHECKING:
    from peft import PeftModel

MARK = "sorsa_residual"
"""Attribute of a transformers config, saved in config.json: the weights are residuals, and of which model."""


def quantize_residual(model: nn.Module, config: SORSAConfig, weights: Source | None = None) -> PeftModel:
    """A SORSA adapter on a quantised model whose targeted weights become quantised residuals, one matrix at a time.

    The same as `get_peft_model` with `residual_base=True` in the config, for weights that no checkpoint names.

    Args:
        model: the quantised model, changed in place.
        config: the adapter's.
        weights: directory, hub id or {name: tensor (out x in)} of the full-precision weights. None for
            `config.full_precision_base`, or the place that the model was loaded from.

    Raises:
        BaseMismatchError: a targeted module is not quantised, or the full-precision weights are another model's.
        FoldError: the base stores residuals already.
        BaseFilesError: the full-precision weights cannot be read.
    """
    with full_precision_weights(weights):
        return get_peft_model(model, replace(config, residual_base=True))


def mark_of(model: Any) -> dict[str, Any] | None:
    """The note in a model's config that its weights are residuals; None if there is no note or no config."""
    found = getattr(getattr(model, "config", None), MARK, None)
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class ConfigMark:
    """The note in a model's config that its weights are residuals.

    Attributes:
        config: the model's config; None if it has none.
    """

    config: Any

    @classmethod
    def of(cls, model: Any) -> ConfigMark:
        """The note of a model."""
        return cls(getattr(model, "config", None))

    def forget(self) -> None:
        """Delete the note: the model's weights are whole again."""
        if isinstance(getattr(self.config, MARK, None), dict):
            delattr(self.config, MARK)


@contextmanager
def residual_base(
    model: nn.Module, adapter_name: str, config: SORSAConfig
) -> Iterator[Callable[[list[SORSALayer]], None]]:
    """The one place where a new adapter meets a base of residuals.

    Enter the context before the adapter is added. It gives a function: call that with the adapter's layers before they
    get values. Leave the context when they have them.

    The layers then know that their base stores a residual, or from which weights to make it. Leaving the context logs
    what was made. If something fails before the first residual is stored, the base is as it was.

    Args:
        model: the base model.
        adapter_name: the new adapter.
        config: its config; `full_precision_base` is filled in if the model says it.

    Raises:
        FoldError: base or config is about residuals, and the other is not.
    """
    _check_request(model, config)
    layers: list[SORSALayer] = []
    to_make: list[SORSALayer] = []

    def announce(adapted: list[SORSALayer]) -> None:
        layers.extend(adapted)
        if config.residual_base:
            _announce(model, layers, adapter_name, config)
        to_make.extend(layer for layer in layers if layer.residual_maker is not None)

    try:
        yield announce
    except BaseException:
        for layer in layers:
            layer.residual_maker = None
        if layers and all(layer.weight_state.is_whole for layer in layers):
            ConfigMark.of(model).forget()
        raise
    _log_rounding(to_make)


def _check_request(model: nn.Module, config: SORSAConfig) -> None:
    residual = any(layer.weight_state.is_residual for layer in sorsa_layers(model))
    if (mark_of(model) or residual) and not config.residual_base:
        raise FoldError(
            "This base model stores quantised residuals: its largest singular triplets are in the adapter that was "
            "made with it, and any other adapter would train a damaged model. Load that one, or the base model that it "
            f"was made from ({(mark_of(model) or {}).get('of') or 'see its full_precision_base'})."
        )
    if mark_of(model) and not residual and not config.factors_from_file:
        raise FoldError(
            "This base model stores quantised residuals already, so residual_base=True cannot make them again. Load "
            f"the adapter that was saved with it (PeftModel.from_pretrained(model, '.../{FOLDER}', "
            "is_trainable=True)), or the full-precision base quantised as it is."
        )


def _announce(model: Any, layers: list[SORSALayer], adapter_name: str, config: SORSAConfig) -> None:
    new = [layer for layer in layers if layer.weight_state.is_whole and layer.quantised]
    mark = ConfigMark.of(model)
    if mark_of(model) and config.factors_from_file:  # else: layers that only a new adapter has store W as quantised
        for layer in new:
            layer.weight_state = Residual(adapter_name, mark)
    elif new:
        named = Path(config.full_precision_base or "")
        if config.factors_from_file and named.is_absolute() and not named.exists():
            config.full_precision_base = None  # a path on another machine; the fingerprint checks the base's own
        source = source_of(model, config.full_precision_base)
        if config.full_precision_base is None and isinstance(source, (str, PathLike)):
            config.full_precision_base = str(source) or None
        maker = ResidualMaker(FullPrecisionWeights(source, model, config.revision), mark)
        for layer in new:
            layer.residual_maker = maker
        if hasattr(model, "config"):
            setattr(model.config, MARK, {"of": config.full_precision_base, "rank": config.r})


class ResidualMaker:
    """Makes the residuals of a model's layers; see `layers.base.ResidualMaker`.

    Args:
        weights: the weights that the base was quantised from.
        mark: the note in the model's config.
    """

    def __init__(self, weights: FullPrecisionWeights, mark: ConfigMark) -> None:
        self.weights = weights
        self.mark = mark

    @torch.no_grad()
    def make(self, layer: Any, adapter_name: str) -> None:
        """Factorise the full-precision weight into a new adapter, and store the quantised residual in the base.

        Raises:
            BaseFilesError: the weight cannot be read.
            BaseMismatchError: it is another model's.
            DecompositionError: it cannot be factorised.
        """
        config, factors = layer.configs[adapter_name], layer.factors(adapter_name)
        weight = self.weights.weight(layer.name, layer.get_base_layer(), layer.base_matrix())
        options = {"svd": config.svd, "seed": config.svd_seed, "energy": config.resolved_svd_energy}
        factors.set_initial(factorise(weight, factors.rank, **options, name=layer.name), factors.fingerprint)
        self._store(layer, adapter_name, weight)
        factors.fingerprint.copy_(fingerprint(layer.base_matrix()))

    @torch.no_grad()
    def settle(self, layer: Any, adapter_name: str) -> None:
        """After an adapter's tensors were loaded: recognise their residual in the base, or make and store it.

        Raises:
            FoldError: the base is on the meta device.
            BaseFilesError, BaseMismatchError: the base does not store the residual, and it cannot be made.
        """
        factors, config = layer.factors(adapter_name), layer.configs[adapter_name]
        matrix = layer.base_matrix()
        if matrix.is_meta:
            raise FoldError(
                f"The base weight of {layer.name} is on the meta device. Load the base model before its adapter."
            )
        near = distance(factors.fingerprint, matrix) <= same_storage_limit(layer.storage())
        stored_alike = config.storage_of(layer.name) == layer.storage()
        # if no config says what the base stores, its fingerprint does
        if self.weights.of_whole_model or not (near and stored_alike):
            self._store(layer, adapter_name, self.weights.weight(layer.name, layer.get_base_layer(), matrix))
        layer.weight_state = Residual(adapter_name, self.mark)
        layer.residual_maker = None

    def _store(self, layer: Any, adapter_name: str, weight: torch.Tensor) -> None:
        initial = layer.factors(adapter_name).initial_matrix().to(weight.device)
        original = layer.stored_weight()
        plain = layer.dequantise(original)
        layer.store_weight(layer.quantise(weight - initial, original))
        layer.weight_state = Residual(adapter_name, self.mark)
        layer.residual_maker = None
        whole = layer.in_full(layer.stored_weight())
        layer.rounding = relative(weight - plain, weight), relative(weight - whole, weight)


def _log_rounding(layers: list[SORSALayer]) -> None:
    """Log one line: the error of the weights, and that of plain quantisation."""
    found = [layer.rounding for layer in layers if layer.rounding is not None]
    if found:
        plain, residual = (sum(part) / len(found) for part in zip(*found, strict=True))
        say(
            "Quantised the residuals of %d weights: their mean relative error is %.3g, and %.3g without the adapter's "
            "triplets taken out.", len(found), residual, plain,
        )  # fmt: skip


def require_quantised(layer: SORSALayer) -> None:
    """Raises BaseMismatchError if a residual is announced for a weight that is stored in full."""
    if not layer.quantised:
        raise BaseMismatchError(
            f"residual_base=True, and {layer.name} ({type(layer.get_base_layer()).__name__}) is not quantised. Load "
            "the base with a quantization_config (in Axolotl: load_in_4bit: true), exclude the module, or use "
            "adapter: sorsa. Only a trained adapter goes on the full-precision model."
        )
