"""What the plug-in adds to Axolotl's configuration schema, and the checks that run before anything is loaded."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sorsa_plugin.extend import RegSchedule, RegUpdate, SvdMethod, nearest

from .recipe import (
    ADAPTERS,
    check_config,
    merge_with_peft,
    refuse_stray,
    refuse_unhonoured,
    use_the_blocks_rate,
)


class SORSABlock(BaseModel):
    """The recipe's `sorsa:` block: the options of `SORSAConfig` for which Axolotl has no key of its own."""

    model_config = ConfigDict(extra="forbid")

    gamma: float | None = Field(
        default=None,
        description="Learning rate of the orthonormal regularizer; 0 turns it off. Default: 4e-4, decoupled 0.1.",
    )
    reg_update: RegUpdate | None = Field(
        default=None,
        description="'coupled' (default) joins the gradient; 'decoupled' acts after the step.",
    )
    reg_schedule: RegSchedule | None = Field(
        default=None, description="Decoupled only: 'lr' (default) follows the learning rate's schedule, or 'constant'."
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Peak learning rate with this adapter, in place of the recipe's, which is then other adapters'.",
    )
    svd: SvdMethod | None = Field(
        default=None, description="How weights are factorised: 'auto' (default), 'exact' or 'randomized'."
    )
    svd_seed: int | None = Field(default=None, description="Seed of the randomized factorisation. Default: 0.")
    svd_energy: float | None = Field(
        default=None, description="Share of the best triplets' energy where it stops. Default: 0.998."
    )
    full_precision_base: str | None = Field(
        default=None,
        description="qsorsa only: the checkpoint that residuals are made from. Default: base_model.",
    )

    @model_validator(mode="before")
    @classmethod
    def check_names_and_switches(cls, block: Any) -> Any:
        """Check the names in the block, before pydantic reads the values.

        Raises:
            ValueError: a name is no option of the block, or a value is true or false.
        """
        known = list(cls.model_fields)
        for name in block if isinstance(block, dict) else ():
            if name not in known:
                raise ValueError(
                    f"{name!r} is no option of the sorsa block; expected {', '.join(known)}.{nearest(name, known)} "
                    "Rank, targets and dropout are Axolotl's own keys: lora_r, lora_target_modules, lora_dropout, ..."
                )
            if isinstance(block[name], bool):  # pydantic would read it as 0 or 1
                raise ValueError(f"{name} is {str(block[name]).lower()}; no option of the sorsa block is a switch.")
        return block


class SORSAArgs(BaseModel):
    """Mixed into Axolotl's schema; checks nothing unless the recipe says `adapter: sorsa` or `qsorsa`."""

    sorsa: SORSABlock | None = Field(default=None, description="Options of `adapter: sorsa` and `qsorsa`.")
    lora_exclude_modules: str | list[str] | None = Field(
        default=None,
        description="Modules to leave out. Axolotl's loader reads this key, its schema of 0.19 lacks it and drops it.",
    )

    @model_validator(mode="before")
    @classmethod
    def check_sorsa_keys(cls, recipe: Any) -> Any:
        """Check the keys of an unparsed recipe with one of our adapters, and set its rate and how merge-lora merges.

        Raises:
            AdapterOptionsError: see `refuse_stray`, `refuse_unhonoured` and `merge_with_peft`.
        """
        if isinstance(recipe, dict) and recipe.get("adapter") in ADAPTERS:
            refuse_stray(recipe, SORSABlock.model_fields)
            refuse_unhonoured(recipe)
            use_the_blocks_rate(recipe)
            merge_with_peft(recipe)
        return recipe

    @model_validator(mode="after")
    def check_sorsa_values(self) -> SORSAArgs:
        """Check the parsed values of a recipe with one of our adapters.

        Raises:
            AdapterOptionsError, SORSAConfigError: see `check_config`.
        """
        if getattr(self, "adapter", None) in ADAPTERS:
            check_config({**self.__dict__, "sorsa": self.sorsa.model_dump(exclude_none=True) if self.sorsa else {}})
        return self
