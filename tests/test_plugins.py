"""The plug-in host: strangers use the hooks that the built-in kinds use, and the command line is theirs to fill."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
import torch
import typer
from builders.adapters import perturb
from peft import LoraConfig, get_peft_model
from torch import nn
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_plugin import (
    AdapterSetup,
    AdapterType,
    SORSAConfig,
    SORSALayer,
    attach,
    gaps,
    hookimpl,
    plugins,
    registered_adapters,
    setup_adapter,
)
from sorsa_plugin.errors import AdapterOptionsError, AttachError, PluginError, UnsupportedLayerError
from sorsa_plugin.layers.kinds.linear import SORSALinear
from sorsa_plugin.plugins import manager
from sorsa_plugin.recipes.adapter_type import AdapterOptions
from sorsa_plugin.regularizer.engines import Engine, WholeFactors
from sorsa_plugin.regularizer.trained_factors import Factor


@contextmanager
def registered(plugin: object, name: str | None = None) -> Iterator[None]:
    manager().register(plugin, name)
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


def test_plugin_says_where_the_factors_live_under_an_engine() -> None:
    model = get_peft_model(model_with(nn.Linear(6, 5)), SORSAConfig(r=2, target_modules=["0"]))
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    engine = types.SimpleNamespace(hidden=inner)

    class Plugin:
        @staticmethod
        @hookimpl
        def sorsa_engine(factors: list[Factor], optimizer: object) -> Engine | None:
            return WholeFactors(optimizer.hidden) if hasattr(optimizer, "hidden") else None

    with pytest.raises(AttachError, match="no plug-in knows"):
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


@pytest.fixture
def forget_failures() -> Iterator[None]:
    before = dict(plugins.broken)
    yield
    plugins.broken.clear()
    plugins.broken.update(before)


def test_installed_plugin_that_cannot_be_imported_is_named_and_harms_nobody_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, forget_failures: None
) -> None:
    """A fresh manager over a broken entry point among the installed ones."""
    entries = [*entry_points(group="sorsa_plugin"), EntryPoint("broken", "no_such_module_anywhere", "sorsa_plugin")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries)
    fresh = manager.__wrapped__()
    assert fresh.has_plugin("transformers")
    assert not fresh.has_plugin("broken")
    assert "ModuleNotFoundError: No module named 'no_such_module_anywhere'" in plugins.broken["broken"].error
    assert "Traceback" in caplog.text
    assert "The plug-in broken of unknown failed and is left out" in caplog.text
    with pytest.raises(AdapterOptionsError, match="Plug-ins that could not be loaded: broken of unknown"):
        setup_adapter({"adapter": "of_the_broken_plugin"})
    listed = json.loads(CliRunner().invoke(build_app(), ["doctor", "--json"]).stdout)
    assert [plugin["name"] for plugin in listed["broken"]] == ["broken"]


class Misspelt:
    @staticmethod
    @hookimpl
    def sorsa_adapter() -> None: ...


class HookOfCommands:
    @staticmethod
    @hookimpl
    def sorsa_commands(app: typer.Typer) -> None: ...


class WrongArgument:
    @staticmethod
    @hookimpl
    def sorsa_adapters() -> list[AdapterType]:
        return []

    @staticmethod
    @hookimpl
    def sorsa_callbacks(config: object) -> None: ...


@pytest.mark.parametrize(
    ("plugin", "message"),
    [(Misspelt, "It implements sorsa_adapter, which nobody calls; expected some of sorsa_layer, sorsa_engine"),
     (HookOfCommands, "Commands come by an entry point of the group sorsa_commands."),
     (WrongArgument, "config")],
)  # fmt: skip
def test_installed_plugin_whose_hooks_cannot_be_called_is_left_out_whole(
    plugin: type, message: str, monkeypatch: pytest.MonkeyPatch, forget_failures: None
) -> None:
    monkeypatch.setattr(EntryPoint, "load", lambda entry: plugin)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint("stranger", "a.module", group)])
    fresh = manager.__wrapped__()
    assert not fresh.has_plugin("stranger")
    assert all(impl.plugin_name != "stranger" for impl in fresh.hook.sorsa_adapters.get_hookimpls())
    assert message in plugins.broken["stranger"].error


def test_plugin_that_fails_in_a_hook_is_named_and_harms_nobody_else(
    caplog: pytest.LogCaptureFixture, forget_failures: None
) -> None:
    class Broken:
        @staticmethod
        @hookimpl
        def sorsa_adapters() -> list[AdapterType]:
            raise RuntimeError("this plug-in is broken")

    with registered(Broken, "a_broken_one"):
        assert CliRunner().invoke(build_app(), ["doctor"]).exit_code == 1
    assert "this plug-in is broken" in caplog.text
    assert "a_broken_one" in plugins.broken


def test_plugin_adds_an_adapter_type() -> None:
    class Plugin:
        @staticmethod
        @hookimpl
        def sorsa_adapters() -> list[AdapterType]:
            def setup(options: AdapterOptions) -> AdapterSetup:
                return AdapterSetup(
                    options.adapter, LoraConfig(r=options.common["r"], lora_alpha=options.own["strength"])
                )

            return [AdapterType("strong", "LoRA by another name", setup)]

    with registered(Plugin):
        setup = setup_adapter({"adapter": "strong", "r": 3, "strong": {"strength": 7}})
        assert (setup.peft_config.r, setup.peft_config.lora_alpha) == (3, 7)
        assert "strong" in registered_adapters()
    with pytest.raises(AdapterOptionsError, match="adapter is 'strong'"):
        setup_adapter({"adapter": "strong"})


def test_two_plugins_that_claim_one_name_are_an_error_naming_both() -> None:
    class Thief:
        @staticmethod
        @hookimpl
        def sorsa_adapters() -> list[AdapterType]:
            return [AdapterType("sorsa", "not the real one", lambda options: AdapterSetup("sorsa", None))]

    with (
        registered(Thief, "thief"),
        pytest.raises(PluginError, match=r"(?s)thief.* both claim the adapter name 'sorsa'") as caught,
    ):
        setup_adapter({"adapter": "lora"})
    assert "sorsa_plugin.recipes.sorsa" in str(caught.value)


def test_the_list_of_plugins_says_who_adds_what() -> None:
    output = CliRunner().invoke(build_app(), ["doctor", "--json"]).stdout
    listed = {plugin["name"]: plugin for plugin in json.loads(output)["plugins"]}
    assert listed["sorsa_plugin.recipes.sorsa"]["adapters"] == ["sorsa", "qsorsa"]
    assert listed["transformers"]["hooks"] == ["sorsa_callbacks"]
    assert listed["transformers"]["distribution"].startswith("sorsa-plugin ")
    assert listed["trl"]["hooks"] == ["sorsa_commands"]
    assert {"lora", "eva", "adalora"} <= set(listed["sorsa_plugin.recipes.peft_methods"]["adapters"])
    table = CliRunner().invoke(build_app(), ["doctor"]).output
    assert all(name in table for name in ("quickstart", "transformers", "trl", "adalora"))
