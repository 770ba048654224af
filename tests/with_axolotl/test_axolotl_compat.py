"""Every private name of Axolotl that the integration uses is there."""

from __future__ import annotations

import inspect

import pytest

pytestmark = pytest.mark.axolotl


def test_every_entry_has_a_name() -> None:
    from sorsa_axolotl import axolotl_compat

    assert all(hasattr(axolotl_compat, name) for name in axolotl_compat.ENTRIES)


def test_axolotls_loader_has_the_methods_that_ask_for_the_adapters_name() -> None:
    from sorsa_axolotl.axolotl_compat import BY_NAME, ModelLoader

    for name in BY_NAME:
        assert "adapter" in inspect.getsource(inspect.unwrap(getattr(ModelLoader, name)))


def test_axolotls_plug_ins_have_the_methods_that_ours_replaces() -> None:
    from sorsa_axolotl import SORSAPlugin
    from sorsa_axolotl.axolotl_compat import PLUGIN, BasePlugin

    for name in PLUGIN:
        theirs = list(inspect.signature(getattr(BasePlugin, name)).parameters)
        ours = inspect.signature(getattr(SORSAPlugin, name)).parameters
        assert set(theirs) <= set(ours) or any(p.kind == p.VAR_KEYWORD for p in ours.values()), (name, theirs)
