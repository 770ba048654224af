"""An adapter type: a word that a recipe can give as `adapter`, the options beside it, and the setup they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config_checks import FILLED_IN
from ..errors import AdapterOptionsError, SORSAError, nearest
from ..plugins import manager
from ..rank_zero import say

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


@dataclass(frozen=True)
class AdapterSetup:
    """What a trainer needs to train with an adapter.

    Attributes:
        adapter: the adapter type's name.
        peft_config: for `get_peft_model`, or a TRL trainer's `peft_config`; None for full fine-tuning.
        callbacks: Trainer callbacks that the method needs, or that log its metrics: those given, and those that
            plug-ins return for the config (`sorsa_callbacks`).
        learning_rate: the peak rate that the method's block names, for the trainer's arguments; None if it names none.
    """

    adapter: str
    peft_config: PeftConfig | None
    callbacks: list[Any] = field(default_factory=list)
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.peft_config is None:
            return
        callbacks = list(self.callbacks)
        for offered in manager().hook.sorsa_callbacks(peft_config=self.peft_config):
            given = {type(callback) for callback in callbacks}
            callbacks += [callback for callback in offered if type(callback) not in given]
        object.__setattr__(self, "callbacks", callbacks)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with the adapter on it, or the model itself for full fine-tuning."""
        from peft import get_peft_model

        return model if self.peft_config is None else get_peft_model(model, self.peft_config)

    def add_callbacks(self, trainer: Any) -> None:
        """Add the callbacks to a Trainer. Those with a `trainer` attribute that is None get the trainer in it.

        Logs one line if the trainer's learning rate is not the one that the method's block names.
        """
        rate = getattr(trainer.args, "learning_rate", None) if self.learning_rate else None
        if rate != self.learning_rate:
            say("The block of %s names learning_rate %s; the trainer has %s.", self.adapter, self.learning_rate, rate)
        for callback in self.callbacks:
            if getattr(callback, "trainer", trainer) is None:
                callback.trainer = trainer
            trainer.add_callback(callback)


@dataclass(frozen=True)
class AdapterOptions:
    """What a recipe says about its adapter, in the vocabulary.

    Attributes:
        adapter: the type's name.
        common: {word of `VOCABULARY`: value} of those that were given.
        own: the method's own block, without its learning rate.
        learning_rate: the peak rate that the block names; None if it names none.
    """

    adapter: str
    common: Mapping[str, Any]
    own: Mapping[str, Any]
    learning_rate: float | None = None


@dataclass(frozen=True)
class AdapterType:
    """A word that `adapter` can be.

    Attributes:
        name: the word.
        summary: one line for listings.
        setup: makes the PEFT config and callbacks from options; imports what it needs when called.
    """

    name: str
    summary: str
    setup: Callable[[AdapterOptions], AdapterSetup]


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
        names: {word of the vocabulary: field of the class}, for words that the class calls otherwise.
        fixed: fields that make the method what it is.
        unused: words of the vocabulary that mean nothing to the method. They are logged, not refused.

    Raises:
        AdapterOptionsError: the class does not have the field, two values disagree, or it refuses a value.
    """
    names, fixed, adapter = names or {}, fixed or {}, options.adapter
    fields = [item.name for item in dataclasses.fields(config_class) if item.init and item.name not in FILLED_IN]
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
