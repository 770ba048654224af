"""A pytest plug-in that makes PEFT's tests run for `SORSAConfig`, in memory: no file of PEFT is edited.

PEFT parametrizes its tests over lists of configs. `pytest_generate_tests` runs after a test module was imported and
before its parametrize marks are expanded, and there the lists are given other contents.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig

from sorsa_plugin import SORSAConfig

from . import cases, local_hub

if importlib.util.find_spec("diffusers") is None:  # PEFT's testing_common.py imports one name from it
    stub = ModuleType("diffusers")
    stub.__spec__ = ModuleSpec("diffusers", None)
    stub.__version__ = "0"  # type: ignore[attr-defined]
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules["diffusers"] = stub


# -- which tests ------------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put our rows into the lists that this test is parametrized over."""
    file = metafunc.module.__name__.rpartition(".")[2]
    _replace_lists(metafunc.module, file)
    for mark in metafunc.definition.iter_markers("parametrize"):
        rows = mark.args[1] if len(mark.args) > 1 else None
        if file == "test_config" and isinstance(rows, tuple) and isinstance(rows[0], tuple):
            object.__setattr__(mark, "args", (mark.args[0], cases.CONFIG_ROWS))
        elif metafunc.function.__name__ in cases.INLINE and isinstance(rows, list):
            of_lora = [row for row in rows if _holds(row, LoraConfig)]
            if of_lora:
                rows[:] = [_as_ours(row) for row in of_lora]


@cache  # once: it writes to the lists of the module
def _replace_lists(module: Any, file: str) -> None:
    if file not in cases.LISTS:
        return
    for name, rows in cases.LISTS[file].items():
        getattr(module, name)[:] = [*rows, *_loras_rows(getattr(module, name))]
    for name in vars(module):
        if name.endswith("_MODELS_TO_TEST") or name == "SMALL_GRID_MODELS":
            getattr(module, name)[:] = [hub_id for hub_id in getattr(module, name) if hub_id in local_hub.MODELS]


def _loras_rows(rows: list[Any]) -> list[Any]:
    """PEFT's own rows (name, model, class, options) for LoRA as written, where SORSA has all of the options."""
    of_lora = [row for row in rows if isinstance(row, tuple) and len(row) == 4 and row[2] is LoraConfig]
    return [(f"as {row[0]}", row[1], SORSAConfig, row[3]) for row in of_lora if set(row[3]) <= cases.SHARED]


def _holds(value: Any, config_class: type) -> bool:
    """Whether a parameter is a config class or an instance of it, or a row with one."""
    if isinstance(value, (tuple, list)):
        return any(_holds(item, config_class) for item in value)
    return value is config_class or isinstance(value, config_class)


def _as_ours(value: Any) -> Any:
    """A parameter with every LoRA config, or the class, replaced by SORSA's of the same rank."""
    if isinstance(value, (tuple, list)):
        return type(value)(_as_ours(item) for item in value)
    if value is LoraConfig:
        return SORSAConfig
    if isinstance(value, LoraConfig):
        shared = ("target_modules", "modules_to_save", "task_type")
        options = {name: getattr(value, name) for name in shared if getattr(value, name)}
        return SORSAConfig(r=value.r, init_weights=bool(value.init_lora_weights), **options)
    return value


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that have a SORSA config among their parameters, and mark those that are expected to fail."""
    kept = [item for item in items if _is_ours(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _is_ours(item)])
    items[:] = kept
    for item in items:
        if item.name.startswith(cases.RANDOM_TWICE):
            options = item.callspec.params  # type: ignore[attr-defined]
            options["config_kwargs"] = {**options["config_kwargs"], "init_weights": False}
        for parts, error, reason in cases.EXPECTED_FAILURES:
            if all(part in item.name for part in parts):
                item.add_marker(pytest.mark.xfail(raises=error, reason=reason, strict=False))


def _is_ours(item: Any) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    # layers cannot be selected where target_modules is an expression or "all-linear": PEFT's configs refuse it
    selects_from_all = isinstance((parameters.get("config_kwargs") or {}).get("target_modules"), str)
    if "layer_indexing" in item.name and selects_from_all:
        return False
    return _holds(list(parameters.values()), SORSAConfig)


# -- around each test -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _without_hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network: the stand-ins of `local_hub.py` for hub ids."""
    local_hub.patch(monkeypatch)
    for module in _modules(request):
        if hasattr(module, "hub_online_once"):
            monkeypatch.setattr(module, "hub_online_once", lambda *args, **kwargs: contextlib.nullcontext())


@pytest.fixture(autouse=True)
def _past_gates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open what PEFT opens by name for its own methods: mixed batches and Conv1D layers."""
    for module in _modules(request):
        # not in testing_utils, which writes init_lora_weights into LoRA's options
        is_utility = module.__name__.endswith("testing_utils")
        if "mixed_adapter_batches" in request.node.name and hasattr(module, "LoraConfig") and not is_utility:
            monkeypatch.setattr(module, "LoraConfig", SORSAConfig)
        for gate in ("_skip_if_conv1d_not_supported", "check_beft_config"):
            if hasattr(module, gate):
                monkeypatch.setattr(module, gate, lambda *args, **kwargs: None)


@pytest.fixture(autouse=True)
def _conditions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same base model twice, and a learning rate, for the tests of `cases.py` that need them."""
    test: str = request.node.originalname
    if test in cases.SAME_BASE:
        model_class = getattr(request.module, cases.SAME_BASE[test])

        def seeded(*args: Any, **kwargs: Any) -> torch.nn.Module:
            torch.manual_seed(0)
            return model_class(*args, **kwargs)

        monkeypatch.setattr(request.module, cases.SAME_BASE[test], seeded)
    limits = [rate for parts, rate in cases.LEARNING_RATES if all(part in request.node.name for part in parts)]
    if limits:
        original = torch.optim.SGD
        monkeypatch.setattr(torch.optim, "SGD", lambda params, lr: original(params, lr=min(lr, *limits)))


@pytest.fixture(autouse=True, scope="session")
def _versions(record_testsuite_property: Any) -> None:
    """For `support_table.py`, in the file of --junit-xml."""
    for package in (peft, torch, transformers):
        record_testsuite_property(package.__name__, package.__version__)


def _modules(request: pytest.FixtureRequest) -> list[Any]:
    shared = [sys.modules.get(f"tests.{name}") for name in ("testing_common", "testing_utils")]
    return [module for module in [*shared, request.module] if module is not None]


def pytest_report_header() -> str:
    return (
        f"SORSA in the tests of peft {peft.__version__}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}; expected to fail: {len(cases.EXPECTED_FAILURES)} kinds of tests"
    )
