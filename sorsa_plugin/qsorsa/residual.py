"""QSORSA: a quantised base that stores Q(W_r), the residual W_r = W - U0 S0 V0^T of the full-precision weight W.

    y = x Q(W_r)^T + ((x V) * S) U^T,    disabled: the same with U0, S0, V0

The largest triplets of W, which a quantised base would round, are in the adapter at fp32; what is rounded is smaller
(as QPiSSA does it for LoRA, arXiv 2404.02948). It is the folded form of `folding.py` for good: there is no W that could
be put back, and the base alone is not the model. A trained adapter also goes on the full-precision model, as any
other: y = x W^T + (x R) L^T.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..config import SORSAConfig
from ..errors import BaseMismatchError, FoldError
from ..files.atomic_directory import appearing_whole, refuse_occupied
from ..layers.folding import Folded
from ..layers.kinds.quantised import relative
from ..layers.layer import SORSALayer
from ..linalg.fingerprint import distance, fingerprint, same_storage_limit
from ..linalg.svd import factorise
from ..rank_zero import say
from ..regularizer.trained_factors import sorsa_layers
from .full_precision_weights import FullPrecisionWeights, Source, full_precision_weights, source_of

if TYPE_CHECKING:
    from peft import PeftModel

MARK = "sorsa_residual"
"""Attribute of a transformers config, saved in config.json: the weights are residuals, and of which model."""

FOLDER = "adapter"
"""Folder of the adapter in what `save_residual` writes."""


def quantize_residual(model: nn.Module, config: SORSAConfig, weights: Source | None = None) -> PeftModel:
    """A SORSA adapter on a quantised model whose targeted weights become quantised residuals; one matrix at a time.

    The same as `get_peft_model` with `residual_base=True` in the config, for weights that no checkpoint names.

    Args:
        model: the quantised model, changed in place.
        config: of the adapter.
        weights: directory, hub id or {name: tensor} of the full-precision weights; None for
            `config.full_precision_base`, or where the model was loaded from.

    Raises:
        SORSAConfigError: a targeted module is not quantised.
        FoldError: the base stores residuals already.
        BaseFilesError, BaseMismatchError: the full-precision weights cannot be read, or are another model's.
    """
    with full_precision_weights(weights):
        return get_peft_model(model, replace(config, residual_base=True))


def mark_of(model: Any) -> dict[str, Any] | None:
    """What a model's config says about its weights being residuals; None: they are not, or it has no config."""
    found = getattr(getattr(model, "config", None), MARK, None)
    return found if isinstance(found, dict) else None


def forget_mark(model: Any) -> None:
    """The model's weights are whole."""
    if mark_of(model):
        delattr(model.config, MARK)


def check_request(model: nn.Module, config: SORSAConfig) -> None:
    """Before an adapter is added: whether its kind fits what the base stores.

    Raises:
        FoldError: one of them is about residuals and the other is not.
    """
    folded = any(layer.folded is not None and layer.folded.intact is None for layer in sorsa_layers(model))
    if (mark_of(model) or folded) and not config.residual_base:
        raise FoldError(
            "This base model stores quantised residuals: its largest singular triplets are in the adapter that was "
            "made with it, and any other adapter would train a damaged model. Load that one, or the base model that it "
            f"was made from ({(mark_of(model) or {}).get('of') or 'see its full_precision_base'})."
        )
    if mark_of(model) and not folded and not config.factors_from_file:
        raise FoldError(
            "This base model stores quantised residuals already, so residual_base=True cannot make them again. Load "
            f"the adapter that was saved with it (PeftModel.from_pretrained(model, '.../{FOLDER}', "
            "is_trainable=True)), or the full-precision base quantised as it is."
        )


@contextmanager
def residuals_announced(model: Any, layers: list[SORSALayer], adapter_name: str, config: SORSAConfig) -> Iterator[None]:
    """In this context, which makes them, new layers know that their base stores a residual, or from which weights it
    will be made; what was made is logged. Where that fails before the first one, the base is as it was."""
    if config.residual_base:
        _announce(model, layers, adapter_name, config)
    to_make = [layer for layer in layers if layer.full_precision is not None]
    try:
        yield
    except BaseException:
        for layer in layers:
            layer.full_precision = None
        if all(layer.folded is None for layer in layers):
            forget_mark(model)
        raise
    say_residuals(to_make)


def _announce(model: Any, layers: list[SORSALayer], adapter_name: str, config: SORSAConfig) -> None:
    new = [layer for layer in layers if layer.folded is None and layer.quantised]
    if mark_of(model) and config.factors_from_file:  # a new adapter's own layers store W as it was quantised
        for layer in new:
            layer.folded = Folded(adapter_name, None)
    elif new:
        named = Path(config.full_precision_base or "")
        if config.factors_from_file and named.is_absolute() and not named.exists():
            config.full_precision_base = None  # a path of another machine; the base's own is checked by fingerprint
        source = source_of(model, config.full_precision_base)
        if config.full_precision_base is None and isinstance(source, (str, PathLike)):
            config.full_precision_base = str(source) or None
        weights = FullPrecisionWeights(source, model, config.revision)
        for layer in new:
            layer.full_precision = weights
        if hasattr(model, "config"):
            setattr(model.config, MARK, {"of": config.full_precision_base, "rank": config.r})


@torch.no_grad()
def make_residual(layer: Any, adapter_name: str) -> None:
    """Factorise the full-precision weight into a new adapter, and store the quantised residual in the base."""
    config, factors = layer.configs[adapter_name], layer.factors(adapter_name)
    weight = layer.full_precision.weight(layer.name, layer.get_base_layer(), layer.base_matrix())
    options = {"svd": config.svd, "seed": config.svd_seed, "energy": config.resolved_svd_energy}
    factors.set_initial(factorise(weight, factors.rank, **options, name=layer.name), factors.fingerprint)
    _store(layer, adapter_name, weight)
    factors.fingerprint.copy_(fingerprint(layer.base_matrix()))


@torch.no_grad()
def settle_loaded(layer: Any, adapter_name: str) -> None:
    """After an adapter's tensors were loaded: recognise the residual that they belong to in the base, or make it.

    Raises:
        FoldError: the base is on the meta device.
        BaseFilesError, BaseMismatchError: it does not store the residual, and that cannot be made.
    """
    factors, config = layer.factors(adapter_name), layer.configs[adapter_name]
    matrix = layer.base_matrix()
    if matrix.is_meta:
        raise FoldError(
            f"The base weight of {layer.name} is on the meta device. Load the base model before its adapter."
        )
    weights = layer.full_precision
    silent = weights is None or not weights.of_whole_model  # no config says what the base stores: its fingerprint does
    near = distance(factors.fingerprint, matrix) <= same_storage_limit(layer.storage())
    if silent and near and config.storage_of(layer.name) == layer.storage():
        weights = None
    if weights is not None:
        _store(layer, adapter_name, weights.weight(layer.name, layer.get_base_layer(), matrix))
    layer.folded = Folded(adapter_name, None)
    layer.full_precision = None


def _store(layer: Any, adapter_name: str, weight: torch.Tensor) -> None:
    initial = layer.factors(adapter_name).initial_matrix().to(weight.device)
    original = layer.stored_weight()
    plain = layer.dequantise(original)
    layer.store_weight(layer.quantise(weight - initial, original))
    layer.folded = Folded(adapter_name, None)
    layer.full_precision = None
    whole = layer.in_full(layer.stored_weight())
    layer.rounding = relative(weight - plain, weight), relative(weight - whole, weight)


@torch.no_grad()
def make_whole(layer: Any) -> None:
    """For a base that goes on without the layer: where it stores a residual and nothing is merged into it, store W."""
    if layer.folded is not None and layer.folded.intact is None and not layer.merged:
        layer.store_weight(layer.as_stored(layer.merged_weight([]), layer.stored_weight()))


def say_residuals(layers: list[SORSALayer]) -> None:
    """Log one line: the error of the weights, and what plain quantisation had."""
    found = [layer.rounding for layer in layers if layer.rounding is not None]
    if found:
        plain, residual = (sum(part) / len(found) for part in zip(*found, strict=True))
        say(
            "Quantised the residuals of %d weights: their mean relative error is %.3g, and %.3g without the adapter's "
            "triplets taken out.", len(found), residual, plain,
        )  # fmt: skip


def save_residual(model: PeftModel, directory: str | PathLike[str], adapter_name: str = "default") -> Path:
    """Write the quantised residual model, which transformers loads, and its adapter in the folder `adapter` of it.

    Load both with `PeftModel.from_pretrained(AutoModel....from_pretrained(directory), directory + "/adapter")`. What is
    written appears complete or not at all.

    Args:
        model: a PEFT model whose base is a transformers model that stores residuals.
        directory: to make; it may exist and be empty.
        adapter_name: which adapter.

    Raises:
        FoldError: the base stores no residuals, or an adapter is merged into it.
        OutputExistsError: the directory exists and is not empty.
    """
    output = Path(directory).resolve()
    layers = sorsa_layers(model)
    if not layers or any(layer.folded is None or layer.folded.intact is not None or layer.merged for layer in layers):
        raise FoldError(
            "The base model stores no quantised residuals now, so there are none to save. Make them with "
            "quantize_residual() or residual_base=True, and unmerge adapters first."
        )
    refuse_occupied(output)
    with appearing_whole(output) as partial:
        write_residual(model, partial, output, adapter_name)
    return output


def write_residual(model: PeftModel, directory: Path, name: Path, adapter_name: str = "default") -> None:
    """Write the quantised residual model and its adapter into a directory whose name will be `name`."""
    base: Any = model.base_model.model
    with without_adapters(base):
        base.save_pretrained(directory)
    model.save_pretrained(str(directory / FOLDER), selected_adapters=[adapter_name])
    folder = directory / FOLDER if adapter_name == "default" else directory / FOLDER / adapter_name
    path = folder / "adapter_config.json"
    options = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": str(name)}
    path.write_text(json.dumps(options, indent=2, sort_keys=True), encoding="utf-8")


@contextmanager
def without_adapters(base: nn.Module) -> Iterator[None]:
    """In this context the model has its base modules in the places of adapted and fully trained ones."""
    swapped: dict[str, Any] = {}
    inside = " "  # of no module's name
    for name, module in base.named_modules():
        if isinstance(module, (SORSALayer, AuxiliaryTrainingWrapper)) and not name.startswith(inside):
            swapped[name], inside = module, f"{name}."
    try:
        for name, module in swapped.items():
            own = module.get_base_layer() if isinstance(module, SORSALayer) else module.original_module
            base.set_submodule(name, own)
        yield
    finally:
        for name, module in swapped.items():
            base.set_submodule(name, module)


def require_quantised(layer: SORSALayer) -> None:
    """Raises BaseMismatchError where a residual is announced for a weight that is stored in full."""
    if not layer.quantised:
        raise BaseMismatchError(
            f"residual_base=True, and {layer.name} ({type(layer.get_base_layer()).__name__}) is not quantised. Load "
            "the base with a quantization_config (in Axolotl: load_in_4bit: true), exclude the module, or use "
            "adapter: sorsa. Only a trained adapter goes on the full-precision model."
        )
