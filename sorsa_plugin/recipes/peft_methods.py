"""The adapter types that need no trainer: LoRA, its variants, MiSS, full fine-tuning, and whatever PEFT registers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from ..errors import AdapterOptionsError, SORSAError
from ..hookspecs import hookimpl
from .setup_adapter import AdapterOptions, AdapterSetup, AdapterType, nearest

LORA_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
"""LoRA's fields for words of the vocabulary."""

NEEDS_A_CALL = {
    "eva": "data, which `adapter: eva` gives it: set adapter: eva",
    "corda": "peft.tuners.lora.corda.preprocess_corda() on data before the adapter is made: build it in Python",
    "lora_ga": "peft.tuners.lora.loraga.preprocess_loraga() on data before the adapter is made: build it in Python",
    "loftq": "a loftq_config and an unquantised base, and it rewrites the base: build it in Python",
    "cartridge": "its prefix filled from text by peft.tuners.cartridge.utils: build it in Python",
}
"""Methods and LoRA initialisations that are another method without a call that only Python code can make."""

NOT_OPTIONS = ("peft_type", "auto_mapping", "inference_mode", "peft_version", "base_storage", "lora_layouts")
"""Fields of PEFT configs that are filled in, not given."""


def build_config(
    config_class: Any,
    options: AdapterOptions,
    *,
    names: Mapping[str, str] | None = None,
    fixed: Mapping[str, Any] | None = None,
    unused: Collection[str] = (),
) -> Any:
    """A PEFT config from options in the vocabulary and the method's own block.

    Args:
        config_class: a PEFT config dataclass.
        options: what the recipe says.
        names: the class's fields for words of the vocabulary, where they differ.
        fixed: fields that make the method what it is.
        unused: words of the vocabulary that mean nothing to the method and are reported, not refused.

    Raises:
        AdapterOptionsError: the class has no such field, two values disagree, or it refuses a value.
    """
    from ..rank_zero import say

    names, fixed, adapter = names or {}, fixed or {}, options.adapter
    fields = [item.name for item in dataclasses.fields(config_class) if item.init and item.name not in NOT_OPTIONS]
    values: dict[str, Any] = {}
    for word, value in options.common.items():
        field = names.get(word, word)
        if field in fields:
            values[field] = value
        elif word in unused:
            say("%s: %r is not used by %s.", word, value, adapter)
        elif word != "dropout" or value:
            raise AdapterOptionsError(f"{word} is {value!r}, and {adapter} has no such option. Delete the line.")
    for word, value in options.own.items():
        field = word if word in fields else names.get(word, word)
        if field not in fields:
            raise AdapterOptionsError(
                f"{word!r} is no option of {adapter}; expected one of {', '.join(fields)}.{nearest(word, fields)}"
            )
        if field in fixed and fixed[field] != value:
            raise AdapterOptionsError(
                f"{word} is {value!r}, and adapter: {adapter} means {fixed[field]!r}. Delete the line, or choose the "
                "adapter that has it."
            )
        if field in values and values[field] != value:
            raise AdapterOptionsError(
                f"{field} is {values[field]!r} outside the block of {adapter} and {value!r} in it. Keep one."
            )
        values[field] = value
    try:
        return config_class(**values | dict(fixed))
    except SORSAError:
        raise
    except (ImportError, TypeError, ValueError) as error:
        raise AdapterOptionsError(f"PEFT refuses these options for {adapter}: {error}") from error


def _lora(options: AdapterOptions, **fixed: Any) -> AdapterSetup:
    from peft import LoraConfig

    initialisation = str(options.own.get("init_lora_weights")).lower()
    if initialisation in NEEDS_A_CALL:
        raise AdapterOptionsError(f"init_lora_weights: {initialisation} needs {NEEDS_A_CALL[initialisation]}.")
    return AdapterSetup(options.adapter, build_config(LoraConfig, options, names=LORA_NAMES, fixed=fixed))


def _pissa(options: AdapterOptions) -> AdapterSetup:
    chosen = options.own.get("init_lora_weights", "pissa")
    if not str(chosen).startswith("pissa"):
        raise AdapterOptionsError(f"init_lora_weights is {chosen!r}; expected 'pissa' or 'pissa_niter_<n>'.")
    own = {name: value for name, value in options.own.items() if name != "init_lora_weights"}
    return _lora(dataclasses.replace(options, own=own), init_lora_weights=chosen)


def _miss(options: AdapterOptions) -> AdapterSetup:
    from peft import MissConfig

    names = {"dropout": "miss_dropout"}
    return AdapterSetup(options.adapter, build_config(MissConfig, options, names=names, unused=("alpha",)))


def _full(options: AdapterOptions) -> AdapterSetup:
    from ..rank_zero import say

    if options.own:
        raise AdapterOptionsError(f"full fine-tuning has no options of its own; got {', '.join(options.own)}.")
    unused = [word for word in options.common if word != "task_type"]
    if unused:
        say("Full fine-tuning has no adapter: %s not used.", ", ".join(unused))
    return AdapterSetup(options.adapter, None)


def verbatim(name: str, config_class: Any) -> AdapterType:
    """An adapter type for a method that PEFT registers: its own config fields, and the vocabulary where it fits."""

    def setup(options: AdapterOptions) -> AdapterSetup:
        fields = {item.name for item in dataclasses.fields(config_class)}
        candidates = {"dropout": (f"{name}_dropout", "module_dropout"), "alpha": (f"{name}_alpha",)}
        names = {word: field for word, choices in candidates.items() for field in choices if field in fields}
        config = build_config(config_class, options, names=names, unused=("alpha",))
        return AdapterSetup(name, config, _calls_during_training(config))

    return AdapterType(name, f"PEFT's {config_class.__name__}, its own fields verbatim", setup)


def _calls_during_training(config: Any) -> list[Any]:
    if getattr(config, "use_asa", False):
        from peft.tuners.adamss.asa_callback import AdamssAsaCallback

        return [AdamssAsaCallback()]
    return []


@hookimpl
def sorsa_adapters() -> list[AdapterType]:
    """LoRA's family, MiSS and full fine-tuning."""
    return [
        AdapterType("lora", "LoRA: B A beside the frozen weight", _lora),
        AdapterType("pissa", "LoRA on the principal singular triplets; rewrites the base to the residual", _pissa),
        AdapterType(
            "olora", "LoRA from a QR decomposition; rewrites the base", partial(_lora, init_lora_weights="olora")
        ),
        AdapterType("dora", "LoRA with a trained magnitude per row", partial(_lora, use_dora=True)),
        AdapterType("rslora", "LoRA with scale alpha / sqrt(r)", partial(_lora, use_rslora=True)),
        AdapterType("miss", "MiSS: shards of one trained matrix", _miss),
        AdapterType("full", "full fine-tuning: every weight, no adapter", _full),
    ]
