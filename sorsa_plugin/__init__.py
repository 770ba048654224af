"""SORSA (arXiv 2409.00055) as a PEFT adapter type. Importing this package registers it with PEFT."""

from .registration import add_peft_type

add_peft_type()  # before anything reads PeftType.SORSA

from .adapters import AdapterSetup, AdapterType, registered_adapters, setup_adapter  # noqa: E402
from .analysis import Analysis, analyze  # noqa: E402
from .attaching import attach  # noqa: E402
from .attachment import Attachment  # noqa: E402
from .config import SORSAConfig  # noqa: E402
from .decomposition import captured_energy, factorise  # noqa: E402
from .dequantising import merge_and_dequantize  # noqa: E402
from .deviations import gaps  # noqa: E402
from .errors import SORSAError  # noqa: E402
from .export import ExportReport, export_lora  # noqa: E402
from .hookspecs import hookimpl  # noqa: E402
from .initial_adapter import InitReport, init_adapter  # noqa: E402
from .initial_residual import ResidualReport, init_residual  # noqa: E402
from .layer import SORSALayer  # noqa: E402
from .lowrank import holding_pairs  # noqa: E402
from .merging import MergeReport, merge_adapter  # noqa: E402
from .model import SORSAModel  # noqa: E402
from .planning import Plan, plan  # noqa: E402
from .registration import register  # noqa: E402
from .regularizer import orthonormality  # noqa: E402
from .residual import quantize_residual, save_residual  # noqa: E402
from .saving import save_adapter  # noqa: E402

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
