"""A layer answers for its base module's public attributes, and for nothing else of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from builders.one_layer import adapt, make_base, only_layer

from sorsa_plugin.layers.weight_state import Folded, Intact


def test_public_attributes_of_the_base_are_read_through_the_layer() -> None:
    model = adapt(make_base())
    layer = only_layer(model)
    layer.get_base_layer().stride = (2,)
    assert layer.stride == (2,)
    assert layer.out_features == 24


def test_hooks_and_flags_of_the_base_are_its_own() -> None:
    layer = only_layer(adapt(make_base()))
    layer.get_base_layer()._is_hf_initialized = True
    assert not hasattr(layer, "_is_hf_initialized")
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        layer.absent  # noqa: B018


def test_copies_and_pickles_of_a_layer_keep_its_state_apart() -> None:
    model = adapt(make_base())
    layer = only_layer(model)
    layer.fold()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin = only_layer(other)
        assert isinstance(twin.weight_state, Folded)
        assert twin.weight_state.intact is not layer.weight_state.intact
        twin.unfold()
        assert isinstance(twin.weight_state, Intact)
        assert torch.equal(twin.weight, layer.weight)
    assert isinstance(layer.weight_state, Folded)
