"""`SORSAPlugin`: the methods that Axolotl calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from sorsa_plugin.extend import complete_model_card, read_config
from sorsa_transformers import SORSACallback

from .axolotl_compat import AdapterCapabilities, BasePlugin
from .checkpoints import choose_checkpoint, save_adapter_alone
from .loading import load, new_config
from .quantising import quantise_as_for_lora
from .recipe import ADAPTERS, refuse_continued_preferences


class SORSAPlugin(BasePlugin):
    """Adds `adapter: sorsa` and `adapter: qsorsa` to Axolotl; does nothing to recipes with another adapter.

    plugins:
      - sorsa_axolotl.SORSAPlugin
    adapter: sorsa
    lora_r: 16
    sorsa:
      gamma: 4.0e-4
    """

    trains = True

    def register(self, cfg: Any) -> None:
        """Note from the unparsed configuration whether the command trains, and prepare the loader to quantise.

        The schema drops `inference`, and nothing tells `load_adapter` about merging.
        """
        self.trains = not (cfg.get("inference") or cfg.get("merge_lora"))
        quantise_as_for_lora()

    def get_input_args(self) -> str:
        return "sorsa_axolotl.args.SORSAArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=name) for name in ADAPTERS]

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse preference tuning that would ignore a saved adapter; see `refuse_continued_preferences`."""
        if cfg.adapter in ADAPTERS and self.trains:
            refuse_continued_preferences(cfg)

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """The model with the adapter, and its config; None if the recipe has another adapter.

        With `config_only` (DPO and KTO, whose trainer makes the adapter): None and the config.
        """
        if cfg.adapter not in ADAPTERS:
            return None
        if config_only:
            return None, new_config(model, cfg)
        return load(model, cfg, trains=self.trains and not inference)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The regularizer's control and its metrics, in Axolotl's log and every reporter."""
        return [SORSACallback(trainer)] if cfg.adapter in ADAPTERS else []

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Choose the checkpoint to resume from, and make the base model object save the adapter alone.

        Raises:
            IncompleteAdapterError, ForeignAdapterError: see `choose_checkpoint`.
        """
        if cfg.adapter in ADAPTERS:
            choose_checkpoint(cfg)
            save_adapter_alone(trainer.model)

    def post_train(self, cfg: Any, model: Any) -> None:
        """Complete the model card: Axolotl writes its own over the adapter's.

        Axolotl calls this before and after the final save.
        """
        if cfg.adapter in ADAPTERS and cfg.local_rank == 0 and (Path(cfg.output_dir) / CONFIG_NAME).is_file():
            complete_model_card(cfg.output_dir, read_config(Path(cfg.output_dir)).card_values())
