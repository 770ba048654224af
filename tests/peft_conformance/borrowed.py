"""PEFT's tests that are written for LoRA alone, tried with `SORSAConfig` in LoRA's place: a survey, not a gate.

    python tests/peft_conformance/run.py --borrowed

Where a test gives LoRA an option that SORSA has no equal of, it is skipped; where it looks at LoRA's own tensors, it
fails. What is left says how far SORSA can stand in for LoRA. Prints a table for docs/support.md.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter, defaultdict
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig

from sorsa_plugin import SORSAConfig

from . import plugin
from .cases import BORROWED_FILES

SHARED = {
    "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "task_type", "layers_to_transform",
    "layers_pattern", "rank_pattern", "trainable_token_indices", "ensure_weight_tying", "inference_mode",
    "fan_in_fan_out", "base_model_name_or_path", "revision",
}  # fmt: skip
"""Options with the same name and meaning."""

WITHOUT_MEANING = {"r", "lora_alpha", "lora_dropout", "init_lora_weights", "bias"}
"""Options that are translated, or have no meaning here at LoRA's default."""

LORAS_OWN = re.compile(
    r"lora|Lora|LORA|has no attribute|DoRA|dora|\.r\b|scaling|add_weighted_adapter|hotswap|Hotswapping|alpha|PeftMixed"
)
HUB = re.compile(r"offline|Hub|hub|LocalEntryNotFound|couldn't connect|OSError|StableDiffusion|diffusers|EntryNotFound")

RANK = re.compile("RankError")

_outcomes: dict[str, Counter[str]] = defaultdict(Counter)


class Borrowed(SORSAConfig):
    """What a test gets for `LoraConfig(...)`."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        strange = sorted(set(options) - SHARED - WITHOUT_MEANING)
        if strange or options.get("bias", "none") != "none":
            pytest.skip(f"LoRA's own options: {strange or 'bias'}")
        shared = {name: value for name, value in options.items() if name in SHARED}
        start = bool(options.get("init_lora_weights", True))
        return SORSAConfig(r=1, init_weights=start, **shared)  # the models have layers of one output


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
    if type(row) is not LoraConfig:
        return row
    shared = {name: value for name in SHARED if (value := getattr(row, name, None))}
    return SORSAConfig(r=1, init_weights=bool(row.init_lora_weights), **shared)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that make a LoRA."""
    kept = [item for item in items if _uses_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _uses_lora(item)])
    items[:] = kept


def _uses_lora(item: Any) -> bool:
    values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    return "LoraConfig" in inspect.getsource(item.function) or plugin._holds(values, SORSAConfig)


@pytest.fixture(autouse=True)
def _borrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from . import local_hub

    local_hub.patch(monkeypatch)
    if hasattr(request.module, "LoraConfig"):
        monkeypatch.setattr(request.module, "LoraConfig", Borrowed)
    if hasattr(request.module, "hub_online_once"):
        monkeypatch.setattr(request.module, "hub_online_once", lambda *args, **kwargs: plugin.contextlib.nullcontext())


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Sort failures by what they need."""
    outcome = yield
    report = outcome.get_result()
    if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
        return
    kind = report.outcome
    if kind == "failed":
        text = "\n".join(line for line in str(report.longrepr).splitlines() if line.startswith(("E  ", ">  ")))
        sorts = {"rank": RANK, "hub": HUB, "lora": LORAS_OWN}
        kind = next((kind for kind, pattern in sorts.items() if pattern.search(text)), "other")
        if kind == "other":
            print(f"\nOTHER {item.nodeid}\n{text[:600]}", file=sys.stderr)
    _outcomes[item.fspath.basename][kind] += 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table."""
    terminalreporter.write_line(f"peft {peft.__version__}, torch {torch.__version__}")
    terminalreporter.write_line(
        "| PEFT's file | pass | give LoRA's options | look at LoRA's parts | rank too high | hub | other |"
    )
    terminalreporter.write_line("|---|---|---|---|---|---|---|")
    for file in BORROWED_FILES:
        n = _outcomes[file]
        row = " | ".join(str(n[kind]) for kind in ("passed", "skipped", "lora", "rank", "hub", "other"))
        terminalreporter.write_line(f"| {file} | {row} |")
