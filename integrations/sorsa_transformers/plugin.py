"""What the Trainer's world adds: its engines, the adapter types that come with a callback, and a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sorsa_plugin.errors import AdapterOptionsError
from sorsa_plugin.hookspecs import hookimpl
from sorsa_plugin.recipes.peft_methods import LORA_NAMES, build_config
from sorsa_plugin.recipes.setup_adapter import AdapterOptions, AdapterSetup, AdapterType
from sorsa_plugin.regularizer.engines import Engine
from sorsa_plugin.regularizer.trained_factors import Factor

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch


@hookimpl
def sorsa_engine(factors: list[Factor], optimizer: Any) -> Engine | None:
    """FSDP2 and DeepSpeed ZeRO; FSDP1 is refused."""
    from .engines import engine_of

    return engine_of(factors, optimizer)


@hookimpl
def sorsa_frozen_as_parameters() -> bool | None:
    """Buffers under DeepSpeed: it casts frozen parameters to 16 bits, and leaves them out of the adapter it saves."""
    from .engines.deepspeed import is_configured

    return False if is_configured() else None


@hookimpl
def sorsa_gather(parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """Whole parameters under ZeRO 3."""
    from .engines.deepspeed import gathered

    return gathered(parameters)


@hookimpl
def sorsa_commands(app: Any) -> None:
    """`sorsa convert-checkpoint`."""
    from .commands import convert_checkpoint

    app.command("convert-checkpoint")(convert_checkpoint)


@hookimpl
def sorsa_adapters() -> list[AdapterType]:
    """SORSA, its form on a quantised residual, EVA and AdaLoRA."""
    return [
        AdapterType("sorsa", "singular triplets U, S, V with an orthonormal regularizer", _sorsa),
        AdapterType("qsorsa", "SORSA on a quantised base that stores the quantised residual", _qsorsa),
        AdapterType("eva", "LoRA from the activations of the first batches; redistributes ranks", _eva),
        AdapterType("adalora", "LoRA as P Lambda Q with ranks pruned during training", _adalora),
    ]


def _qsorsa(options: AdapterOptions) -> AdapterSetup:
    return _sorsa(options, residual_base=True)


def _sorsa(options: AdapterOptions, **fixed: Any) -> AdapterSetup:
    from sorsa_plugin import SORSAConfig

    from .callback import SORSACallback

    config = build_config(SORSAConfig, options, names={"dropout": "sorsa_dropout"}, fixed=fixed, unused=("alpha",))
    return AdapterSetup(options.adapter, config, [SORSACallback()])


def _eva(options: AdapterOptions) -> AdapterSetup:
    from dataclasses import fields

    from peft import EvaConfig, LoraConfig

    from .peft_callbacks import EvaCallback

    known = {item.name for item in fields(EvaConfig)}
    eva = EvaConfig(**{name: value for name, value in options.own.items() if name in known})
    own = {name: value for name, value in options.own.items() if name not in known}
    config = build_config(
        LoraConfig,
        AdapterOptions(options.adapter, options.common, own),
        names=LORA_NAMES,
        fixed={"init_lora_weights": "eva", "eva_config": eva},
    )
    return AdapterSetup(options.adapter, config, [EvaCallback()])


def _adalora(options: AdapterOptions) -> AdapterSetup:
    from peft import AdaLoraConfig

    from .peft_callbacks import AdaLoraCallback

    own = dict(options.own)
    rank = options.common.get("r")
    if rank is not None:
        if own.get("target_r", rank) != rank:
            raise AdapterOptionsError(f"r is {rank} and target_r is {own['target_r']}, and both mean the final rank.")
        own["target_r"] = rank
        own.setdefault("init_r", rank + rank // 2)  # the proportion of PEFT's defaults, 8 and 12
    common = {word: value for word, value in options.common.items() if word != "r"}
    # AdaLoraConfig demands the number of steps, which only the trainer knows: the callback corrects it
    placeholder = own.get("tinit", 0) + own.get("tfinal", 0) + 1
    own.setdefault("total_step", placeholder)
    config = build_config(AdaLoraConfig, AdapterOptions(options.adapter, common, own), names=LORA_NAMES)
    return AdapterSetup(options.adapter, config, [AdaLoraCallback(own["total_step"] == placeholder)])
