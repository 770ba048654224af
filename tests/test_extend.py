"""The page for plug-in authors is complete, and its manual is true."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn

import sorsa_plugin
from sorsa_plugin import extend, hookspecs
from sorsa_plugin.plugins import manager


class Kernel(nn.Module):
    """y = x K, with K stored (in x out) under a name of its own: the module that the manual adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.kernel


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = Kernel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def blocks() -> list[str]:
    """The code in the manual: indented paragraphs."""
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", extend.__doc__ or "", flags=re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def test_it_lists_all_that_it_imports() -> None:
    tree = ast.parse(Path(extend.__file__).read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported - {"annotations"} == set(extend.__all__)
    assert extend.__all__ == sorted(extend.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))


def test_names_that_are_public_too_are_the_same_objects() -> None:
    both = set(extend.__all__) & set(sorsa_plugin.__all__)
    assert {"AdapterSetup", "AdapterType", "SORSALayer", "hookimpl"} <= both
    assert all(getattr(extend, name) is getattr(sorsa_plugin, name) for name in both)


def test_the_manual_names_every_hook() -> None:
    hooks = [name for name in vars(hookspecs) if name.startswith("sorsa_")]
    assert len(hooks) == 6
    assert all(f"{name}(" in (extend.__doc__ or "") for name in hooks)


def test_the_layer_kind_of_the_manual_works() -> None:
    code = next(block for block in blocks() if "class MyLayer" in block)
    namespace = {name: getattr(extend, name) for name in extend.__all__}
    exec(compile(code, "manual", "exec"), namespace)
    kind = namespace["MyLayer"]

    class Plugin:
        @extend.hookimpl
        def sorsa_layer(self, target: nn.Module, config: object) -> type | None:
            return kind if isinstance(target, Kernel) else None

    plugin = Plugin()
    base, x = Model(), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    expected = base(x).detach()
    manager().register(plugin, "manual")
    try:
        model = get_peft_model(base, extend.SORSAConfig(r=2, target_modules=["proj"]))
    finally:
        manager().unregister(plugin)
    assert torch.equal(model(x), expected)
    (layer,) = extend.sorsa_layers(model)
    U, S, V = layer.get_factors()
    layer.set_factors("default", U, 2 * S, V)
    changed = expected.double() + x.double() @ ((V * S) @ U.T).double()
    # products of 6 and 4 terms in fp32, each rounded: 10 roundings of the sum of absolute values at most
    bound = 10 * 2.0**-24 * float((x.abs() @ base.proj.get_base_layer().kernel.abs()).max() * 3)
    assert (model(x).double() - changed).abs().max() < bound


def test_the_engine_of_the_manual_is_one() -> None:
    code = next(block for block in blocks() if "class MyEngine" in block)
    namespace = {name: getattr(extend, name) for name in extend.__all__}
    exec(compile(code, "manual", "exec"), namespace)
    engine = namespace["MyEngine"]
    assert issubclass(engine, extend.Engine)
    assert engine.__abstractmethods__ == frozenset()
