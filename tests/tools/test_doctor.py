"""`sorsa doctor` reads what is installed here, by the ranges of our own metadata, and finds what is wrong."""

from __future__ import annotations

import json
import re
import sys
import types
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from typer.testing import CliRunner

import sorsa_plugin.tools.doctor as doctor
from sorsa_cli import build_app
from sorsa_plugin import AdapterType, hookimpl, plugins
from sorsa_plugin.compat import FLOORS
from sorsa_plugin.tools.doctor import Package, examine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_it_reports_what_is_installed_and_the_ranges_of_pyproject():
    found = {package.name: package for package in examine().packages}
    declared = tomllib.loads(PROJECT.read_text())["project"]
    assert found["torch"].installed == version("torch") == torch.__version__
    assert found["transformers"].installed == transformers.__version__
    assert found["peft"].installed == peft.__version__
    assert found["python"].supported == declared["requires-python"]
    for name in ("torch", "transformers", "peft", "accelerate"):
        (line,) = (line for line in declared["dependencies"] if re.match(rf"{name}\b", line))
        assert set(found[name].supported.split(",")) == set(line.removeprefix(name).split(","))
        assert found[name].needed
        assert found[name].in_range
        assert name not in FLOORS or f">={FLOORS[name]}" in line
    assert set(found["trl"].supported.split(",")) == {">=1.9", "<2"}
    assert not found["trl"].needed


@pytest.mark.parametrize(
    ("installed", "needed", "in_range", "problem"),
    [("1.5", True, True, False), ("2.0", False, False, True), ("0.9", True, False, True), ("1.9rc1", True, True, False),
     (None, True, False, True), (None, False, False, False), ("1.2+cpu", True, True, False)],
)  # fmt: skip
def test_a_package_is_a_problem_where_it_is_needed_and_absent_or_of_another_version(
    installed, needed, in_range, problem
):
    package = Package("torch", installed, ">=1,<2", needed)
    assert (package.in_range, package.problem) == (in_range, problem)
    assert package.command == 'pip install "torch>=1,<2"'


def test_here_everything_is_in_order():
    diagnosis = examine()
    assert diagnosis.healthy
    assert diagnosis.registered
    loaded = {plugin.name: plugin for plugin in diagnosis.plugins}
    assert loaded["sorsa_plugin.recipes.sorsa"].adapters == ("sorsa", "qsorsa")
    assert loaded["sorsa_plugin.layers.kinds.linear"].hooks == ("sorsa_layer",)
    assert loaded["quickstart"].distribution.startswith("sorsa-plugin ")
    assert diagnosis.broken == ()
    assert diagnosis.conflict is None
    assert diagnosis.device.startswith("cpu" if not torch.accelerator.is_available() else "1 x")


def test_another_registration_is_noticed(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.SORSA, types.SimpleNamespace)
    assert not examine().registered
    assert not examine().healthy


def test_a_plugin_that_cannot_be_loaded_is_named_with_its_error(monkeypatch):
    error = "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"
    broken = plugins.BrokenPlugin("mine", "a-package 1.0", error, "Traceback of mine")
    monkeypatch.setitem(plugins.broken, "mine", broken)
    assert examine().broken == (broken,)
    run = CliRunner().invoke(build_app(), ["doctor"])
    assert run.exit_code == 1
    assert "mine of a-package 1.0 failed" in run.output
    assert "Traceback of mine" in run.output


def offering(name):
    """A plug-in that offers an adapter type of some name; of the name None it fails."""

    class Plugin:
        @staticmethod
        @hookimpl
        def sorsa_adapters():
            return [AdapterType(name.lower(), "", lambda options: None)]

    return Plugin


def test_plugins_that_fail_when_asked_or_claim_one_name_are_found(monkeypatch):
    monkeypatch.setattr(plugins, "broken", broken := {})
    monkeypatch.setattr(doctor, "broken", broken)
    for name, message in ((None, "AttributeError"), ("sorsa", "both claim the adapter name 'sorsa'")):
        stranger = offering(name)
        plugins.manager().register(stranger, "stranger")
        try:
            found = examine()
        finally:
            plugins.manager().unregister(stranger)
        assert not found.healthy
        assert message in "".join([*(plugin.error for plugin in found.broken), found.conflict or ""])
        broken.clear()
    assert examine().healthy


def test_an_absent_engine_comes_with_its_command_and_is_no_problem(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "trl" else version("torch"))
    run = CliRunner().invoke(build_app(), ["doctor", "--json"])
    trl = json.loads(run.stdout)["packages"]["trl"]
    assert (trl["installed"], trl["in_range"]) == (None, False)
    assert re.fullmatch(r'pip install "trl(>=1\.9,<2|<2,>=1\.9)"', trl["command"])
