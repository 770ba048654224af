"""Computes the new values of the parameters that an adapter changes, one at a time; knows no shard.

Each layer merges by itself, on an otherwise empty model. The arithmetic, the order in which a kind stores its weight
and the check of the fingerprint are those of `merge_and_unload`.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from ...errors import IncompleteAdapterError
from ...files.adapter_format import FROZEN, OFFSETS
from ...files.stored_parameters import StoredWeights
from .changes import Adapters, Change, Stored


class MergedWeights:
    """New values, in the dtypes that the base is stored in.

    Args:
        stored: the base's tensors.
        changes: {parameter: what the adapter does to it}.
        adapters: those that are merged, with their files.
        safe: look for NaN and infinity in what is made.
    """

    def __init__(self, stored: StoredWeights, changes: dict[str, Change], adapters: Adapters, safe: bool) -> None:
        self.stored = stored
        self.changes = changes
        self.adapters = adapters
        self._safe = safe
        self._parts: dict[str, torch.Tensor] = {}

    def alike(self, parameters: list[str]) -> bool:
        """Whether parameters that are one tensor in the base are still equal after merging."""
        first, *others = (self.changes.get(name, Change()) for name in parameters)
        return all(self._same(first, other) for other in others)

    def _same(self, one: Change, other: Change) -> bool:
        if one._replace(whole=None) != other._replace(whole=None) or one.whole is None or other.whole is None:
            return one == other
        return torch.equal(self._read(one.whole), self._read(other.whole))

    def _read(self, stored: Stored) -> torch.Tensor:
        adapter, name = stored
        return self.adapters[adapter].tensors.get_tensor(name)

    def shape_of(self, stored: Stored) -> list[int]:
        """The shape of a tensor in an adapter's file."""
        adapter, name = stored
        return self.adapters[adapter].tensors.get_slice(name).get_shape()

    def value(self, parameter: str) -> torch.Tensor:
        """The parameter as it is stored in the merged model, in the stored shape and dtype.

        Raises:
            IncompleteAdapterError: the factors hold NaN or infinity, or `safe` is set and the result does.
            BaseMismatchError: the adapter was trained on another base model.
        """
        value, change = self.stored.as_stored(parameter), self.changes.get(parameter, Change())
        if change.whole is not None:
            value = self._read(change.whole).to(value.dtype)
        if change.rows is not None:
            rows = self._read(change.rows).to(value.dtype)
            value = value.index_copy(0, torch.tensor(change.tokens), rows)
        if change.layer is not None:
            value = self._merged(change, value)
        if self._safe and not value.isfinite().all():
            raise IncompleteAdapterError(
                f"{parameter} would hold NaN or infinity after merging, in {value.dtype}. Its base weight holds some, "
                "the training run diverged, or the sum leaves the range of the dtype: check both, or merge a base in "
                "bf16."
            )
        return value

    def part(self, parameter: str, key: str) -> torch.Tensor:
        """The new value of one of the stored tensors that make a parameter, in the stored shape and dtype.

        The other tensors made by the same conversion are kept until they are asked for. Each can be had only once.

        Raises:
            IncompleteAdapterError, BaseMismatchError: see `value`.
            BaseFilesError: transformers cannot undo the conversion.
        """
        if key not in self._parts:
            together = self.stored.made_together(parameter)
            self._parts |= self.stored.split({name: self.value(name) for name in together})
        return self._parts.pop(key)

    def _merged(self, change: Change, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the change of the factors added, by a layer that is empty again afterwards."""
        layer: Any = change.layer
        factors = {
            adapter: {name: self._read((adapter, beginning + name)) for name in (*OFFSETS, *FROZEN)}
            for adapter, beginning in change.factors
        }
        if not all(tensor.isfinite().all() for tensors in factors.values() for tensor in tensors.values()):
            raise IncompleteAdapterError(
                f"The factors of {layer.name} hold NaN or infinity; expected finite numbers. The training run diverged "
                "or the file was damaged: merge an earlier checkpoint."
            )
        base, empty = layer.get_base_layer(), layer.sorsa_factors
        # fill a copy, so that all of it is freed: an allocation made here that stayed would pin freed memory
        layer.sorsa_factors = deepcopy(empty)
        setattr(base, layer.parameter_name, nn.Parameter(weight, requires_grad=False))
        for adapter, tensors in factors.items():
            layer.factors(adapter).load_state_dict(tensors)
        layer.merge(adapter_names=list(factors))  # each is checked against the weight, and the sum is rounded once
        merged = layer.base_weight().data
        layer.unmerge()
        setattr(base, layer.parameter_name, None)
        layer.sorsa_factors = empty
        return merged
