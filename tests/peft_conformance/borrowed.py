"""PEFT's tests that are written for LoRA alone, tried with `SORSAConfig` in LoRA's place: a survey, not a gate.

    python tests/peft_conformance/run.py --borrowed

What passes shows how far SORSA can stand in for LoRA; every other test is sorted by the reason why it cannot.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from typing import Any

import pytest
from peft import LoraConfig

from sorsa_plugin import SORSAConfig

from . import plugin
from .cases import SHARED, TRANSLATED
from .plugin import _versions, _without_hub  # noqa: F401  (fixtures)

PASSES = "passes"
OWN_OPTIONS = "gives LoRA's own options"
HUB = "needs the hub or diffusers"
LORAS_PARTS = "looks at LoRA's tensors or messages"
REASONS = {
    "RankError": "gives a module a rank of its own that it has not",
    r"offline|[Hh]ub\b|huggingface|LocalEntryNotFound|OSError|StableDiffusion|CLIPText": HUB,
    "BaseMismatchError": "loads onto another base, which is refused",
    "PeftMixedModel": "mixes methods in one model: PEFT has a closed list",
    r"[Ll]o[Rr]a|LORA|has no attribute|DID NOT WARN|KeyError|\.r\b|scaling": LORAS_PARTS,
}
"""{what the error says: why the test cannot pass}, in the order in which they are tried."""
BY_NAME = {
    "test_save_pretrained_auto": HUB,  # asks for the base model's config, and goes on without it
    "test_get_peft_model_applies_find_target_modules": LORAS_PARTS,  # counts the modules of LoRA's class
}
"""{test: the reason}, where the error does not say it."""
PEFTS_OWN = "fails for LoRA too"
OTHER = "other"

_outcomes: Counter[str] = Counter()


class Borrowed(SORSAConfig):
    """What a test gets for `LoraConfig(...)`."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        strange = sorted(set(options) - SHARED - TRANSLATED)
        if strange or options.get("bias", "none") != "none":
            pytest.skip(f"LoRA's own options: {strange or 'bias'}")
        return _with(options)


def _with(options: dict[str, Any]) -> SORSAConfig:
    shared = {name: value for name, value in options.items() if name in SHARED}
    return SORSAConfig(init_weights=bool(options.get("init_lora_weights", True)), **shared)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """LoRA's configs among the parameters become SORSA's."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        rows = mark.args[1] if len(mark.args) > 1 else None
        if isinstance(rows, (list, tuple)):
            object.__setattr__(mark, "args", (mark.args[0], [_as_ours(row) for row in rows], *mark.args[2:]))


def _as_ours(row: Any) -> Any:
    if isinstance(row, tuple) and not hasattr(row, "_fields"):
        return tuple(_as_ours(item) for item in row)
    return _with({key: value for key, value in vars(row).items() if value}) if type(row) is LoraConfig else row


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that make a LoRA."""
    kept = [item for item in items if _makes_a_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _makes_a_lora(item)])
    items[:] = kept


def _makes_a_lora(item: Any) -> bool:
    values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    return "LoraConfig" in inspect.getsource(item.function) or plugin._holds(values, SORSAConfig)


@pytest.fixture(autouse=True)
def _borrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(request.module, "LoraConfig"):
        monkeypatch.setattr(request.module, "LoraConfig", Borrowed)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Keep with each test why it did not pass."""
    report = (yield).get_result()
    if report.when == "call" or (report.when == "setup" and not report.passed):
        outcome = {"passed": PASSES, "skipped": OWN_OPTIONS}.get(report.outcome) or _reason(item, str(report.longrepr))
        outcome = PEFTS_OWN if hasattr(report, "wasxfail") else outcome
        item.user_properties.append(("outcome", outcome))
        _outcomes[outcome] += 1


def _reason(item: Any, traceback: str) -> str:
    if item.originalname in BY_NAME:
        return BY_NAME[item.originalname]
    errors = "\n".join(line for line in traceback.splitlines() if line.startswith(("E  ", ">  ")))
    return next((reason for pattern, reason in REASONS.items() if re.search(pattern, errors)), OTHER)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many tests of each sort."""
    for outcome, count in _outcomes.most_common():
        terminalreporter.write_line(f"{count:4} {outcome}")
