"""`SORSAModel`: puts SORSA layers where the config says; PEFT drives it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import LoraConfig
from torch import nn

from ..compat.peft import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, BaseTuner, LoraModel
from ..config import SORSAConfig
from ..errors import UnsupportedLayerError
from ..files.adapter_format import count_layouts, plain_layouts
from ..layers.base_weight import keep_here
from ..layers.factors import ROUNDED
from ..layers.folding import fold_layers
from ..layers.kinds.attention import leave_fused_encoders
from ..layers.kinds.experts import ParamWrapper
from ..layers.kinds.quantised import warn_about_rounding
from ..layers.kinds.tied import TiedLayer, tied_layer
from ..layers.layer import SORSALayer, sorsa_layers
from ..layers.unwrapped import without_adapters
from ..linalg.offset_form import holding_pairs
from ..linalg.svd import energy_share
from ..qsorsa.residual import residual_base
from ..regularizer.auto_attach import watch_optimizers
from .adapter_names import check_adapter_name
from .experts import adapt_experts_as_lora
from .initialise import initialise_layers
from .layer_choice import Ranks, layer_class_for, new_layer, say_other_inputs, say_unmatched
from .mixed_batch import copies_per_row, mixed_batch
from .rollback import take_off, whole_or_not_at_all
from .state_dict_check import check_adapters, take_wrappers_out
from .wildcard import resolve_all_linear


class SORSAModel(BaseTuner):
    """A model with SORSA adapters (arXiv 2409.00055); made by `peft.get_peft_model(model, SORSAConfig(...))`.

    Args:
        model: the base model. Its weights are written only while adapters are merged or layers folded, and when QSORSA
            stores residuals in a quantised base.
        peft_config: a `SORSAConfig`, or one per adapter name.
        adapter_name: the name of the first adapter.
        low_cpu_mem_usage: create the adapter on the meta device; the code that loads it gives it storage.
    """

    prefix = "sorsa_"
    tuner_layer_cls = SORSALayer
    # PEFT users expect LoRA's targets by default; the published script adapts all seven projections ("all-linear")
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Create the adapter on every targeted module, then factorise their weights one at a time; all or nothing.

        Raises:
            SORSAConfigError: the adapter cannot have this name.
            RankError, UnsupportedLayerError: a targeted module cannot take the adapter.
            DecompositionError: a weight holds NaN or infinity, or does not converge on any device.
            FoldError, BaseFilesError, BaseMismatchError: see `residual.py`.
        """
        config = self.peft_config[adapter_name]
        named = set(config.target_modules) if isinstance(config.target_modules, set | list | tuple) else set()
        with (
            residual_base(model, adapter_name, config) as announce,
            whole_or_not_at_all(model, adapter_name, self.peft_config),
        ):
            check_adapter_name(adapter_name)
            say_other_inputs(model, config)
            self._ranks = Ranks(config, adapt_experts_as_lora(config, model))
            named &= set(config.target_modules or ())
            if not config.factors_from_file:
                resolve_all_linear(config, model, partial(self._check_linear, config, model))
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            leave_fused_encoders(model)
            everyone = sorsa_layers(model)
            for layer in everyone:
                layer.family = everyone[0].family
            layers = [layer for layer in everyone if adapter_name in layer.sorsa_factors]
            self._ranks.note()
            self._ranks.say()
            if config.factors_from_file:
                config.lora_layouts = plain_layouts(config.lora_layouts)
            else:
                config.base_storage = _storage(layers)
                config.lora_layouts = {
                    name: list(layout)
                    for name, layer in _names(model, adapter_name).items()
                    if (layout := layer.lora_layout())
                }
                config.adapted_layers = count_layouts(_names(model, adapter_name), config.lora_layouts)
                say_unmatched(model, named, [layer for layer in everyone if adapter_name in layer.configs])
            announce(layers)
            initialise_layers(layers, adapter_name)
        watch_optimizers()

    def _pre_injection_hook(self, model: nn.Module, config: SORSAConfig, adapter_name: str) -> None:
        """Remove what another tuner left of an adapter of this name: from a refused file, or an earlier attempt."""
        take_off(model, adapter_name)

    def initial_energy(self, adapter_name: str = "default") -> dict[str, float]:
        """{layer: share of ||W||_F^2 (0 to 1) that its initial triplets hold}; a zero weight gives 1.

        The share tells how much of each weight the adapter starts from. Takes one pass over the weights.
        """
        found = {}
        for layer in sorsa_layers(self):
            if adapter_name in layer.sorsa_factors:
                factors = layer.factors(adapter_name)
                whole = layer.merged_weight([]).float()  # W itself, also if merged or folded
                found[layer.name] = energy_share(factors.S0, whole)
        return found

    def fold(self) -> None:
        """Store W - U0 S0 V0^T in every adapted layer, for cheaper training steps; all layers or none.

        For one adapter without dropout, in one process or under DDP. `folding.py` says what it costs.

        Raises:
            FoldError: a layer cannot be folded.
        """
        fold_layers([layer for layer in sorsa_layers(self) if layer.configs], self.model)

    def unfold(self) -> None:
        """Put every folded layer's W back, bit for bit.

        Raises:
            FoldError: an adapter is merged, or the base stores residuals.
        """
        for layer in sorsa_layers(self):
            layer.unfold()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        """PEFT's method. The base model that is left holds W, or the merge of it, whatever the layers stored."""
        layers = sorsa_layers(self)
        merging = args[0] if args else kwargs.get("merge", True)
        for layer in layers:
            layer.weight_state.before_unload(layer, merging)
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        for layer in layers:
            layer.weight_state.after_unload(layer)
        warn_about_rounding(layers)
        return unloaded

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's method. If it refuses, nothing has been deleted yet.

        Raises:
            FoldError: no other adapter holds the triplets that a base of residuals lacks.
        """
        for layer in sorsa_layers(self):
            if adapter_name in layer.sorsa_factors:
                layer.weight_state.refuse_to_delete(layer, adapter_name)
        super().delete_adapter(adapter_name)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's method. On quantised layers the sum is quantised again, and a log line says what that costs."""
        super().merge_adapter(*args, **kwargs)
        warn_about_rounding(sorsa_layers(self))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, with each adapter's pair L, R formed once and not for every token."""
        with holding_pairs():
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Receives PEFT's special forward arguments, which PeftModel drops afterwards without a word.

        Raises:
            ValueError: alora_offsets was passed; for adapter_names see `mixed_batch`.
        """
        if kwargs.get("alora_offsets") is not None:
            raise ValueError("alora_offsets was passed, and SORSA has no activated variant as LoRA has. Leave it out.")
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        with mixed_batch(self.model, adapter_names, copies_per_row(kwargs)):
            yield

    def _check_new_adapter_config(self, config: SORSAConfig) -> None:
        """PEFT's checks, and one of LoRA's.

        Raises:
            ValueError: another adapter has other target_parameters, so that their wrappers would nest differently.
        """
        super()._check_new_adapter_config(config)
        targets = set(config.target_parameters or [])
        for name, other in self.peft_config.items():
            others = set(getattr(other, "target_parameters", None) or [])
            if other is not config and targets and others and targets != others:
                raise ValueError(
                    "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                    f"parameters, but got {sorted(targets)} for the new adapter and {sorted(others)} for adapter "
                    f"'{name}'."
                )

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """PEFT's method, run on the bare base model: it looks for names that an earlier adapter changes."""
        with without_adapters(self.model):
            return super()._get_module_names_tied_with_embedding()

    # about LoRA in name only: they read fields that this config has too
    _prepare_adapter_config = LoraModel._prepare_adapter_config
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie
    _add_targets_to_tie = LoraModel._add_targets_to_tie

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in the place of its base module, or back.

        PEFT's own method also moves the adapter to the base weight's device, which is the meta device for an offloaded
        weight. Our adapter is created where it belongs.
        """
        setattr(parent, child_name, new_module)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the sum of two changes has twice the rank and is no adapter of this method.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "A weighted combination of SORSA adapters is no SORSA adapter: its factors would not be orthonormal. "
            "Activate several adapters at once with base_model.set_adapter([...]), or export them with export_lora() "
            "and combine the LoRAs."
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Make the offsets fp32, or the dtype of the base if the caller asks for that: the compute dtype of 4 bits, and
        that of the weight elsewhere if it is a floating one, as for LoRA. The frozen factors stay fp32.

        16-bit offsets serve inference; `attach` makes them fp32 again before they train.
        """
        for layer in sorsa_layers(self):
            if adapter_name in layer.sorsa_factors:  # PEFT offloads what it loads onto an offloaded base
                keep_here(layer.factors(adapter_name))
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in sorsa_layers(self) if not autocast_adapter_dtype else []:
            dtype = getattr(layer.get_base_layer(), "compute_dtype", layer.base_weight().dtype)
            if adapter_name in layer.sorsa_factors and dtype in ROUNDED:
                layer.factors(adapter_name).cast_offsets(dtype)

    def _check_target_module_compatiblity(self, peft_config: SORSAConfig, model: nn.Module, target_name: str) -> None:
        """PEFT's check, and the one that it makes for LoRA alone.

        Mamba's kernels read the weights of some modules and never call them.

        Raises:
            ValueError: the target is such a module.
        """
        super()._check_target_module_compatiblity(peft_config, model, target_name)
        super()._check_target_module_compatiblity(LoraConfig(), model, target_name)

    def _check_linear(self, config: SORSAConfig, model: nn.Module, name: str, module: nn.Module) -> None:
        """Raise what adapting a linear layer would raise by reason of its kind."""
        self._check_target_module_compatiblity(config, model, name.rpartition(".")[2])
        layer_class_for(config, module, name)

    def _create_and_replace(
        self,
        peft_config: SORSAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        adapted = isinstance(target, SORSALayer) and parameter_name in (None, target.parameter_name)
        tied = bool(self._check_tied_module_exists(peft_config, current_key))
        if isinstance(target, SORSALayer) and adapted:
            if tied != isinstance(target, TiedLayer):
                raise UnsupportedLayerError(
                    f"{current_key} {'is' if tied else 'is not'} tied to the embedding's adapter by {adapter_name!r}, "
                    "and the other way with the adapters that it has; expected one way for all. Give every adapter "
                    "the same ensure_weight_tying."
                )
            target.update_layer(adapter_name, self._ranks.of(current_key, target), peft_config)
            return
        if parameter_name is not None:
            layer: SORSALayer = ParamWrapper(target, current_key, parameter_name)
        elif tied:
            layer = tied_layer(target, current_key, self.model.get_input_embeddings())
        else:
            layer = new_layer(peft_config, target, current_key)
        layer.update_layer(adapter_name, self._ranks.of(current_key, layer), peft_config)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        self._replace_module(parent, target_name, layer, target)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Check names, shapes and fingerprints of all layers before one takes a tensor."""
        layers = {name: layer for name, layer in self.named_modules() if isinstance(layer, SORSALayer)}
        take_wrappers_out(state_dict, prefix, layers)
        check_adapters(state_dict, prefix, layers, list(self.peft_config))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _names(model: nn.Module, adapter_name: str) -> dict[str, SORSALayer]:
    """{name in the file: layer} of the layers that have an adapter, those tied to others included."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SORSALayer)}
    return {name: layer for name, layer in layers.items() if adapter_name in layer.configs}


def _storage(layers: list[SORSALayer]) -> str | dict[str, str] | None:
    """How the layers' weights are stored, in the form that the config keeps."""
    stored = {layer.name: layer.storage() for layer in layers}
    kinds = set(stored.values())
    return stored if len(kinds) > 1 else next(iter(kinds), None)
