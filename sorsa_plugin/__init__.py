"""SORSA (arXiv 2409.00055) as a PEFT adapter type. Importing this package registers it with PEFT."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import SORSAConfig
from .errors import SORSAError
from .layers.layer import SORSALayer
from .linalg.offset_form import holding_pairs
from .linalg.svd import captured_energy, factorise
from .plugins import hookimpl
from .qsorsa.dequantize import merge_and_dequantize
from .qsorsa.prepare import ResidualReport, init_residual
from .qsorsa.residual import quantize_residual
from .qsorsa.save_residual import save_residual
from .recipes.adapter_type import AdapterSetup, AdapterType
from .recipes.setup_adapter import registered_adapters, setup_adapter
from .regularizer.attach import attach
from .regularizer.gaps import gaps
from .regularizer.step_hooks import Attachment
from .regularizer.trained_factors import orthonormality
from .tuner.model import SORSAModel
from .tuner.registration import register

if TYPE_CHECKING:
    from .tools.analysis.analyze import Analysis, analyze
    from .tools.export_lora import ExportReport, export_lora
    from .tools.init_adapter import InitReport, init_adapter
    from .tools.merge.merge_adapter import MergeReport, merge_adapter
    from .tools.plan import Plan, plan
    from .tools.save_adapter import save_adapter

register()

_OFFLINE = {
    "Analysis": "tools.analysis.analyze",
    "ExportReport": "tools.export_lora",
    "InitReport": "tools.init_adapter",
    "MergeReport": "tools.merge.merge_adapter",
    "Plan": "tools.plan",
    "analyze": "tools.analysis.analyze",
    "export_lora": "tools.export_lora",
    "init_adapter": "tools.init_adapter",
    "merge_adapter": "tools.merge.merge_adapter",
    "plan": "tools.plan",
    "save_adapter": "tools.save_adapter",
}
"""Public names whose modules are imported when the name is first used: training needs none of them."""


def __getattr__(name: str) -> Any:
    if name not in _OFFLINE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_OFFLINE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFLINE})


__all__ = [
    "AdapterSetup",
    "AdapterType",
    "Analysis",
    "Attachment",
    "ExportReport",
    "InitReport",
    "MergeReport",
    "Plan",
    "ResidualReport",
    "SORSAConfig",
    "SORSAError",
    "SORSALayer",
    "SORSAModel",
    "analyze",
    "attach",
    "captured_energy",
    "export_lora",
    "factorise",
    "gaps",
    "holding_pairs",
    "hookimpl",
    "init_adapter",
    "init_residual",
    "merge_adapter",
    "merge_and_dequantize",
    "orthonormality",
    "plan",
    "quantize_residual",
    "registered_adapters",
    "save_adapter",
    "save_residual",
    "setup_adapter",
]
