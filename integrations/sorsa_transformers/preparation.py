"""What has to happen to a model's adapters before a Trainer wraps the model and builds the optimizer."""

from __future__ import annotations

from torch import nn

from sorsa_plugin.extend import frozen_as_parameters, say, sorsa_layers


def prepare_adapters(model: nn.Module | None) -> None:
    """Put frozen factors where the engine that was announced keeps them, and trained offsets into fp32.

    TRL casts those of a new adapter to bf16 on a quantised base, and FSDP could not cast them back.
    """
    restored = 0
    for layer in sorsa_layers(model) if model is not None else []:
        for adapter in layer.sorsa_factors:
            factors = layer.factors(adapter)
            factors.place_frozen(frozen_as_parameters())
            if adapter in layer.trained():
                restored += len(factors.restore_fp32())
    if restored:
        say("%d SORSA offsets had been cast to 16 bits; they train in fp32.", restored)
