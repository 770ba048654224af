"""SORSA (arXiv 2409.00055) as a PEFT adapter type. Importing this package registers it with PEFT."""

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
from .tools.analysis.analyze import Analysis, analyze
from .tools.export_lora import ExportReport, export_lora
from .tools.init_adapter import InitReport, init_adapter
from .tools.merge.merge_adapter import MergeReport, merge_adapter
from .tools.plan import Plan, plan
from .tuner.model import SORSAModel
from .tuner.registration import register
from .tuner.save_adapter import save_adapter

register()

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
