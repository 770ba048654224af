"""The plug-in host: strangers use the hooks that the built-in kinds use, and the command line is theirs to fill."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import typer
from peft import get_peft_model
from support import perturb
from torch import nn
from typer.testing import CliRunner

from sorsa_plugin import SORSAConfig, SORSALayer, attach, gaps, hookimpl
from sorsa_plugin.cli import build_app
from sorsa_plugin.errors import AttachError, PluginError, UnsupportedLayerError
from sorsa_plugin.layers.linear import SORSALinear
from sorsa_plugin.plugins import manager


@contextmanager
def registered(plugin: object) -> Iterator[None]:
    manager().register(plugin)
    try:
        yield
    finally:
        manager().unregister(plugin)


class Scaled(nn.Module):
    """A stranger's layer: y = 2 x W^T, of no kind this package knows."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, inner, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x @ self.weight.T


class SORSAScaled(SORSALayer):
    """SORSA on `Scaled`: the change is doubled as the output is."""

    def base_matrix(self) -> torch.Tensor:
        return self.get_base_layer().weight

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unmerge_if_disabled()
        y = self.base_layer(x)
        for name in self.adapters_in_use():
            L, R = self.ready_factors(name).low_rank_pair()
            y = y + 2 * (self.sorsa_dropout[name](x) @ R) @ L.mT
        return y


class ScaledPlugin:
    @staticmethod
    @hookimpl
    def sorsa_layer(target: nn.Module, config: SORSAConfig) -> type[SORSALayer] | None:
        return SORSAScaled if isinstance(target, Scaled) else None


def model_with(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer)


def test_plugin_adds_a_layer_kind() -> None:
    """Trains, is regularized, and merges: (W + L R^T) doubled, in fp32 over 6 terms, to a few roundings of 1e-6."""
    base = Scaled(6, 5)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    with registered(ScaledPlugin):
        model = get_peft_model(model_with(base), SORSAConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    assert isinstance(layer, SORSAScaled)
    assert torch.equal(model(x), 2 * x @ base.weight.T)
    perturb(model, scale=0.3)
    U, S, V = layer.get_factors("default")
    factors = layer.factors("default")
    expected = 2 * x @ (base.weight + (U * S) @ V.T - (factors.U0 * factors.S0) @ factors.V0.T).T
    torch.testing.assert_close(model(x), expected, rtol=0, atol=2e-5)
    before = gaps(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    attach(model, optimizer, gamma=0.01)
    (model(x) ** 2).mean().mul(1e-3).backward()
    optimizer.step()
    assert all(gap < before[name] for name, gap in gaps(model).items())
    trained = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), trained, rtol=0, atol=2e-5)


def test_unregistered_plugin_is_gone() -> None:
    with registered(ScaledPlugin):
        pass
    with pytest.raises(UnsupportedLayerError, match="Target module 0 of type Scaled is not supported by SORSA"):
        get_peft_model(model_with(Scaled(6, 5)), SORSAConfig(r=2, target_modules=["0"]))


def test_plugin_is_asked_before_the_built_in_kinds() -> None:
    class Special(SORSALinear):
        """A stranger's idea of nn.Linear."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    class Plugin:
        @staticmethod
        @hookimpl
        def sorsa_layer(target: nn.Module, config: SORSAConfig) -> type[SORSALayer] | None:
            return Special if isinstance(target, nn.Linear) else None

    def kind() -> type:
        model = get_peft_model(model_with(nn.Linear(6, 5)), SORSAConfig(r=2, target_modules=["0"]))
        return type(model.base_model.model[0])

    with registered(Plugin):
        assert kind() is Special
    assert kind() is SORSALinear


def test_plugin_finds_the_optimizer_inside_an_engine() -> None:
    model = get_peft_model(model_with(nn.Linear(6, 5)), SORSAConfig(r=2, target_modules=["0"]))
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    engine = types.SimpleNamespace(hidden=inner)

    class Plugin:
        @staticmethod
        @hookimpl
        def sorsa_attach(model: nn.Module, optimizer: object) -> torch.optim.Optimizer | None:
            return getattr(optimizer, "hidden", None)

    with pytest.raises(AttachError, match="No plug-in knows"):
        attach(model, engine)
    with registered(Plugin):
        assert attach(model, engine) is attach(model, inner)


def test_version_is_the_installed_distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "sorsa_plugin-9.8.7.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: sorsa-plugin\nVersion: 9.8.7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    result = CliRunner().invoke(build_app(), ["--version"])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == "9.8.7"


def test_plugin_adds_a_command() -> None:
    class Plugin:
        @staticmethod
        @hookimpl
        def sorsa_commands(app: typer.Typer) -> None:
            @app.command()
            def greet(name: str) -> None:
                typer.echo(f"hello {name}")

    with registered(Plugin):
        result = CliRunner().invoke(build_app(), ["greet", "you"])
    assert result.output.strip() == "hello you"
    assert CliRunner().invoke(build_app(), ["greet", "you"]).exit_code != 0


def test_installed_plugin_that_cannot_be_imported_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh manager over a broken entry point, as pluggy reads them from installed distributions."""
    broken = types.SimpleNamespace(
        metadata={"name": "broken"},
        entry_points=[EntryPoint("broken", "no_such_module_anywhere", "sorsa_plugin")],
    )
    monkeypatch.setattr("importlib.metadata.distributions", lambda: [broken])
    with pytest.raises(PluginError, match="no_such_module_anywhere"):
        manager.__wrapped__()
