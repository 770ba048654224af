"""Maps stored tensors to a model's parameters by transformers' own rules of loading, one parameter at a time.

    files = BaseFiles("directory or hub id")
    weights = StoredWeights(files, files.empty_model("CAUSAL_LM"))
    weights.key("model.layers.0.mlp.up_proj.weight")         # the stored tensor that is this parameter
    weights.sources("model.layers.0.mlp.experts.down_proj")  # all stored tensors that a parameter is made of
    weights.read("model.layers.0.mlp.up_proj.weight")        # the parameter, as from_pretrained gives it
    weights.split({"model.layers.0.mlp.experts.down_proj": new})  # the stored tensors that make new values

While it loads, transformers renames, fuses, splits and transposes tensors of some architectures
(`conversion_mapping.py`), adds or drops the base model's prefix, and ties weights that are stored once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..compat.transformers import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
    revert_weight_conversion,
)
from ..errors import BaseFilesError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .base_checkpoint import BaseFiles


@dataclass
class _Recipe:
    """A converter of transformers, the stored tensors that it takes, by pattern, and the first parameter it makes."""

    converter: WeightConverter
    first: str
    takes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def convert(self, tensors: Any, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """{parameter: tensor} from `tensors`, a function of a stored name."""
        converter = deepcopy(self.converter)
        for pattern, keys in self.takes.items():
            for key in keys:
                converter.add_tensor(self.first, key, pattern, lambda key=key: tensors(key))
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class StoredWeights:
    """The parameters of a model, found among stored tensors by the rules that transformers loads them by.

    Args:
        files: the stored tensors.
        model: gives parameters, dtypes and rules. It may be on the meta device, and must not hold adapters yet.
    """

    def __init__(self, files: BaseFiles, model: PreTrainedModel) -> None:
        self.files = files
        self.model = model
        self.parameters = {name: tensor.detach().to("meta") for name, tensor in model.state_dict().items()}
        self.tied = dict(model.all_tied_weights_keys)
        self._plain: dict[str, str] = {}
        self._made: dict[str, _Recipe] = {}
        self._match()

    def _match(self) -> None:
        """The first half of transformers' `convert_and_load_state_dict_in_model`."""
        rules = self._rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self.model.base_model_prefix
        recipes: dict[str, _Recipe] = {}
        for key in sorted(self.files.names, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, self.parameters)
            if name not in self.parameters and key in self.parameters:
                name, pattern = rename_source_key(key, [], [], prefix, self.parameters)
            if name not in self.parameters:
                continue
            if pattern is None:
                self._plain.setdefault(name, key)  # transformers also loads the first of several
            else:
                recipe = recipes.setdefault(name, _Recipe(by_pattern[pattern], name))
                recipe.takes[pattern].append(key)
        for recipe in recipes.values():  # convert on the meta device, to find out which parameters it makes
            self._made |= dict.fromkeys(recipe.convert(self.files.headers.__getitem__, self.model), recipe)

    def stored_as(self, parameter: str) -> str | None:
        """The parameter for which tensors are stored: itself, or one that it is tied to; None if there is none."""
        together = {parameter, self.tied.get(parameter, parameter)}
        together |= {target for target, source in self.tied.items() if source in together}
        for name in (parameter, *sorted(together)):
            if name in self._plain or name in self._made:
                return name
        return None

    def __contains__(self, parameter: str) -> bool:
        return self.stored_as(parameter) is not None

    def sources(self, parameter: str) -> list[str]:
        """The names of the stored tensors that a parameter is made of.

        Raises:
            BaseFilesError: none is stored.
        """
        name = self.stored_as(parameter)
        if name is None:
            raise BaseFilesError(
                f"No tensor in {self.files.directory} becomes {parameter} of {type(self.model).__name__}, so its "
                "values would be random. Give the checkpoint of this architecture, or exclude the module."
            )
        if name in self._plain:
            return [self._plain[name]]
        return [key for keys in self._made[name].takes.values() for key in keys]

    def made_together(self, parameter: str) -> dict[str, torch.Tensor]:
        """{name: meta tensor, in the model's shape} of all parameters that one conversion makes with this one.

        Empty if transformers converts nothing.
        """
        recipe = self._made.get(self.stored_as(parameter) or "")
        return recipe.convert(self.files.headers.__getitem__, self.model) if recipe else {}

    def key(self, parameter: str) -> str:
        """The name of the one stored tensor that is this parameter.

        Raises:
            BaseFilesError: no tensor is stored for it, or a conversion makes it of stored tensors.
        """
        sources = self.sources(parameter)
        if self.stored_as(parameter) in self._made:
            raise BaseFilesError(
                f"{parameter} is not stored as it is: transformers makes it from {', '.join(sources[:3])}"
                f"{' and so on' if len(sources) > 3 else ''}. Load the model with transformers for this."
            )
        return sources[0]

    def read(self, parameter: str) -> torch.Tensor:
        """The parameter as from_pretrained gives it: converted, in the model's shape and dtype.

        Raises:
            BaseFilesError: it is not stored, or its shape is not the model's.
        """
        expected = self.parameters[parameter]
        value = self.as_stored(parameter)
        if value.shape != expected.shape:
            raise BaseFilesError(
                f"{parameter} is stored with shape {tuple(value.shape)}; {type(self.model).__name__} expects "
                f"{tuple(expected.shape)}. config.json and the weights belong to different models."
            )
        return value.to(expected.dtype).contiguous()

    def as_stored(self, parameter: str) -> torch.Tensor:
        """The parameter, converted, in the dtype and shape that are stored.

        Raises:
            BaseFilesError: it is not stored.
        """
        name = self.stored_as(parameter)
        if name in self._made:
            return self._made[name].convert(self.files.tensor, self.model)[name]
        return self.files.tensor(self.sources(parameter)[0])

    def split(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """{stored name: tensor} from which transformers would make these values, in the shapes and dtypes stored.

        Args:
            values: {parameter: value} of all that are `made_together`. On the meta device, this only checks whether it
                works.

        Raises:
            BaseFilesError: transformers cannot undo the conversion bit for bit.
        """
        first, *_ = values
        sources, prefix = self.sources(first), f"{self.model.base_model_prefix}."
        self.model._weight_conversions = [rule for rule in self._rules if rule.was_used()]  # as from_pretrained does
        found = revert_weight_conversion(self.model, dict(values))
        parts = {}
        for name, part in found.items():  # no rule adds or drops the prefix: rename_source_key does
            spellings = (name, prefix + name, name.removeprefix(prefix))
            parts[next((key for key in spellings if key in sources), name)] = part.contiguous()
        headers = self.files.headers
        same = parts.keys() == set(sources) and all(
            (part.shape, part.dtype) == (headers[key].shape, headers[key].dtype) for key, part in parts.items()
        )
        made = self._made[first].convert(parts.__getitem__, self.model) if same else {}
        if made.keys() != values.keys() or not all(
            value.is_meta or torch.allclose(made[name], value, rtol=0, atol=0, equal_nan=True)
            for name, value in values.items()
        ):
            raise BaseFilesError(
                f"transformers makes {first} from {', '.join(sources[:3])}{' and so on' if len(sources) > 3 else ''}, "
                "and cannot take it apart into these again."
            )
        return parts
