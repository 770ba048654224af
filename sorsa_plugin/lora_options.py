"""What the options of PEFT's `LoraConfig` mean to `SORSAConfig`, so that a LoRA script needs one word changed.

What means the same is taken, under our name if ours differs. What means nothing here is said in one line. What would
change the result is refused. An option at LoRA's default asks for nothing, and is accepted.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import cache, wraps
from typing import Any, TypeVar

from peft import LoraConfig
from peft.utils import PeftType

from .compat.peft import layers_of_users
from .config_checks import FILLED_IN
from .errors import LoraOptionError, SORSAConfigError, UnknownOptionError, nearest
from .rank_zero import say

RENAMED = {"lora_dropout": "sorsa_dropout"}
"""{LoRA's option: ours of the same meaning}"""

UNUSED = ("lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights")
"""LoRA's options that mean nothing to SORSA, which has no scale and a start of its own."""

REMEDIES = {
    "bias": 'SORSA trains no bias: a disabled adapter would no longer be the base model. Delete it, or set bias="none"',
    "lora_bias": "SORSA trains no bias: a disabled adapter would no longer be the base model. Delete it",
    "layer_replication": "SORSA does not repeat layers. Repeat them in the base model and save it, or use LoRA",
    "loftq_config": "it rewrites the base for LoRA; for SORSA residual_base=True does. Delete it",
    "megatron_config": "SORSA does not adapt Megatron's layers. Delete it",
    "megatron_core": "SORSA does not adapt Megatron's layers. Delete it",
}
"""{LoRA's option that cannot be honoured: why, and what to do}, where it is not that the option makes another LoRA."""

Config = TypeVar("Config", bound=type)


def takes_lora_options(ours: Config) -> Config:
    """Class decorator: the class's constructor takes LoraConfig's options too; its fields and signature stay.

    Args:
        ours: a PEFT config dataclass.
    """
    construct: Any = ours.__init__  # type: ignore[misc]

    @wraps(construct)
    def init(self: Any, *args: Any, **options: Any) -> None:
        construct(self, *args, **own_options(options, ours))

    ours.__init__ = init  # type: ignore[misc]
    return ours


def own_options(given: Mapping[str, Any], ours: type) -> dict[str, Any]:
    """The options that a config class is made with. Logs one line if some of those given mean nothing to it.

    Args:
        given: {name: value}, of ours and of LoraConfig's.
        ours: a PEFT config dataclass.

    Raises:
        SORSAConfigError: an option is given under both of its names, with two values.
        LoraOptionError: an option of LoraConfig's cannot be honoured.
        UnknownOptionError: neither class has an option.
    """
    known = _names(ours)
    own = {name: value for name, value in given.items() if name in known}
    rest = {name: value for name, value in given.items() if name not in known}
    _refuse_unknown(rest.keys() - set(_names(LoraConfig)), known)
    for theirs, name in RENAMED.items():
        if theirs not in rest:
            continue
        value = rest.pop(theirs)
        if own.setdefault(name, value) != value:
            raise SORSAConfigError(f"{theirs} is {value!r} and {name} is {own[name]!r}; they are one. Keep one.")
    unused = {name: rest.pop(name) for name in UNUSED if name in rest}
    _refuse_another_lora({name: value for name, value in rest.items() if not _is_default(name, value)})
    said = [f"{name}={value!r}" for name, value in unused.items() if _asks(name, value)]
    if said:
        say(
            "SORSAConfig does not use %s: S is trained, so there is no scale, and it starts from singular triplets.",
            ", ".join(said),
        )
    return own


def options_of_lora(config: Any, ours: type) -> dict[str, Any]:
    """The options of our class that say what a LoraConfig says. Logs one line on those that mean nothing to it.

    Args:
        config: a LoraConfig; nothing of it is shared with the result.
        ours: a PEFT config dataclass.

    Raises:
        SORSAConfigError: it is no LoraConfig, or one of another method, such as AdaLoraConfig.
        LoraOptionError: an option of it cannot be honoured.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise SORSAConfigError(f"from_lora got {type(config).__name__}; expected peft.LoraConfig.")
    if layers := layers_of_users(config):
        raise LoraOptionError(
            f"from_lora got a LoraConfig with layers of your own for {', '.join(kind.__name__ for kind in layers)}; "
            "SORSA cannot train them. Take another LoraConfig, without _register_custom_module; a plug-in can add a "
            "layer kind for these modules."
        )
    known = _names(ours)
    values = {name: getattr(config, name) for name in _names(LoraConfig) if name not in FILLED_IN}
    asked = {name: value for name, value in values.items() if name in known or not _is_default(name, value)}
    return own_options(copy.deepcopy(asked), ours)


def lora_of(config: Any) -> LoraConfig:
    """The LoRA with the options that a config of ours shares with LoraConfig: rank, modules, tokens; its own scale.

    Args:
        config: a SORSAConfig; nothing of it is shared with the result.
    """
    shared = set(_names(type(config))) & set(_names(LoraConfig)) - set(FILLED_IN)
    return LoraConfig(**{name: copy.deepcopy(getattr(config, name)) for name in shared})


def _refuse_unknown(names: Collection[str], known: list[str]) -> None:
    if not names:
        return
    expected = [name for name in known if name not in FILLED_IN]
    # PEFT looks for the words "got an unexpected keyword argument", to drop options of newer versions' files
    raise UnknownOptionError(
        f"SORSAConfig got an unexpected keyword argument {', '.join(map(repr, sorted(names)))}; expected some of "
        f"{', '.join(expected)}.{nearest(min(names), [*expected, *RENAMED])}"
    )


def _refuse_another_lora(options: Mapping[str, Any]) -> None:
    if not options:
        return
    reasons = (
        f"{name}={value!r}: {REMEDIES.get(name, 'it makes another LoRA. Delete it')}" for name, value in options.items()
    )
    raise LoraOptionError(f"SORSAConfig cannot honour {len(options)} of LoraConfig's options. {'; '.join(reasons)}.")


def _names(config_class: type) -> list[str]:
    return [option.name for option in fields(config_class) if option.init]


@cache
def _lora_defaults() -> LoraConfig:
    return LoraConfig()


def _is_default(name: str, value: Any) -> bool:
    """Whether an option asks LoRA for nothing."""
    return value is None or value == getattr(_lora_defaults(), name)


def _asks(name: str, value: Any) -> bool:
    """Whether an unused option is worth a line: LoRA scales by any alpha that is given, its default included."""
    return value is not None if name == "lora_alpha" else not _is_default(name, value)
