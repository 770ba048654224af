"""The adapter types of PEFT's own methods: LoRA's family, MiSS, AdaLoRA, full fine-tuning, and all others in PEFT.

Callbacks that some of them need during training come through the hook `sorsa_callbacks`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from ..errors import AdapterOptionsError
from ..plugins import hookimpl
from ..rank_zero import say
from .adapter_type import AdapterOptions, AdapterSetup, AdapterType, build_config

LORA_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
"""{word of the vocabulary: LoRA's field}"""

NEEDS_A_CALL = {
    "eva": "data, which `adapter: eva` gives it: set adapter: eva",
    "corda": "peft.tuners.lora.corda.preprocess_corda() on data before the adapter is made: build it in Python",
    "lora_ga": "peft.tuners.lora.loraga.preprocess_loraga() on data before the adapter is made: build it in Python",
    "loftq": "a loftq_config and an unquantised base, and it rewrites the base: build it in Python",
    "cartridge": "its prefix filled from text by peft.tuners.cartridge.utils: build it in Python",
}
"""{method or initialisation of LoRA: the call that it needs}. Without that call it is another method."""


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
    if options.own:
        raise AdapterOptionsError(f"full fine-tuning has no options of its own; got {', '.join(options.own)}.")
    unused = [word for word in options.common if word != "task_type"]
    if unused:
        say("Full fine-tuning has no adapter: %s not used.", ", ".join(unused))
    return AdapterSetup(options.adapter, None)


def verbatim(name: str, config_class: Any) -> AdapterType:
    """An adapter type for a method that PEFT registers: its own config fields, and words of the vocabulary."""

    def setup(options: AdapterOptions) -> AdapterSetup:
        fields = {item.name for item in dataclasses.fields(config_class)}
        candidates = {"dropout": (f"{name}_dropout", "module_dropout"), "alpha": (f"{name}_alpha",)}
        names = {word: field for word, choices in candidates.items() for field in choices if field in fields}
        return AdapterSetup(name, build_config(config_class, options, names=names, unused=("alpha",)))

    return AdapterType(name, f"PEFT's {config_class.__name__}, its own fields verbatim", setup)


def _eva(options: AdapterOptions) -> AdapterSetup:
    from peft import EvaConfig, LoraConfig

    known = {item.name for item in dataclasses.fields(EvaConfig)}
    eva = EvaConfig(**{name: value for name, value in options.own.items() if name in known})
    own = {name: value for name, value in options.own.items() if name not in known}
    fixed = {"init_lora_weights": "eva", "eva_config": eva}
    config = build_config(LoraConfig, dataclasses.replace(options, own=own), names=LORA_NAMES, fixed=fixed)
    return AdapterSetup(options.adapter, config)


def _adalora(options: AdapterOptions) -> AdapterSetup:
    from peft import AdaLoraConfig

    own = dict(options.own)
    rank = options.common.get("r")
    if rank is not None:
        if own.get("target_r", rank) != rank:
            raise AdapterOptionsError(f"r is {rank} and target_r is {own['target_r']}, and both mean the final rank.")
        own["target_r"] = rank
        own.setdefault("init_r", rank + rank // 2)  # the proportion of PEFT's defaults, 8 and 12
    common = {word: value for word, value in options.common.items() if word != "r"}
    # AdaLoraConfig requires the number of steps, which only the trainer knows: the callback replaces this one
    own.setdefault("total_step", steps_placeholder(own.get("tinit", 0), own.get("tfinal", 0)))
    config = build_config(AdaLoraConfig, AdapterOptions(options.adapter, common, own), names=LORA_NAMES)
    return AdapterSetup(options.adapter, config)


def steps_placeholder(tinit: int, tfinal: int) -> int:
    """The smallest total_step that AdaLoraConfig accepts. It stands for a number of steps that is not known yet."""
    return tinit + tfinal + 1


@hookimpl
def sorsa_adapters() -> list[AdapterType]:
    """LoRA's family, MiSS, EVA, AdaLoRA and full fine-tuning."""
    return [
        AdapterType("lora", "LoRA: B A beside the frozen weight", _lora),
        AdapterType("pissa", "LoRA on the principal singular triplets; rewrites the base to the residual", _pissa),
        AdapterType(
            "olora", "LoRA from a QR decomposition; rewrites the base", partial(_lora, init_lora_weights="olora")
        ),
        AdapterType("dora", "LoRA with a trained magnitude per row", partial(_lora, use_dora=True)),
        AdapterType("rslora", "LoRA with scale alpha / sqrt(r)", partial(_lora, use_rslora=True)),
        AdapterType("miss", "MiSS: shards of one trained matrix", _miss),
        AdapterType("eva", "LoRA from the activations of the first batches; redistributes ranks", _eva),
        AdapterType("adalora", "LoRA as P Lambda Q with ranks pruned during training", _adalora),
        AdapterType("full", "full fine-tuning: every weight, no adapter", _full),
    ]
