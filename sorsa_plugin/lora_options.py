"""Options of PEFT's LoraConfig that SORSAConfig has not: what to do about each, for whoever brings them along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from peft import LoraConfig

from .errors import LoraOptionError

REMEDIES = {
    "lora_alpha": "SORSA has no scale, because S is trained. Delete it",
    "alpha_pattern": "SORSA has no scale, because S is trained. Delete it",
    "use_rslora": "it scales LoRA, and SORSA has no scale. Delete it",
    "lora_dropout": "here it is called sorsa_dropout",
    "bias": 'SORSA trains no bias: a disabled adapter would no longer be the base model. Delete it, also bias="none"',
    "init_lora_weights": "SORSA starts from the singular triplets, and `svd` says how they are computed. Delete it",
    "layer_replication": "SORSA does not repeat layers. Repeat them in the base model and save it, or use LoRA",
}


def refuse_lora_options(given: Iterable[str], ours: type) -> None:
    """Check the names of options given to a config class.

    Raises:
        LoraOptionError: some are LoRA's alone.
    """
    loras = {option.name for option in fields(LoraConfig)} - {option.name for option in fields(ours)}
    foreign = [name for name in given if name in loras]
    if foreign:
        reasons = "; ".join(f"{name}: {REMEDIES.get(name, 'it makes another LoRA. Delete it')}" for name in foreign)
        raise LoraOptionError(f"SORSAConfig got {len(foreign)} of LoraConfig's options that it has not. {reasons}.")
