"""The plug-in: the Trainer callbacks that adapters need, or that log their metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sorsa_plugin.extend import SORSAConfig, hookimpl, steps_placeholder

from .default_callbacks import join_every_trainer

if TYPE_CHECKING:
    from peft import PeftConfig

join_every_trainer()  # plug-ins are loaded when the first adapter is made


@hookimpl
def sorsa_callbacks(peft_config: PeftConfig) -> list[Any]:
    """SORSA's control and metrics, and the calls that EVA, AdaLoRA and AdaMSS need during training."""
    if isinstance(peft_config, SORSAConfig):
        from .callback import SORSACallback

        return [SORSACallback()]
    config: Any = peft_config
    if getattr(config, "init_lora_weights", None) == "eva":
        from .peft_callbacks import EvaCallback

        return [EvaCallback()]
    if config.peft_type == "ADALORA":
        from .peft_callbacks import AdaLoraCallback

        return [AdaLoraCallback(config.total_step == steps_placeholder(config.tinit, config.tfinal))]
    if getattr(config, "use_asa", False):
        from .trainer_compat import AdamssAsaCallback

        return [AdamssAsaCallback()]
    return []
