"""SORSA (arXiv 2409.00055) as a PEFT adapter type. Importing this package registers it with PEFT."""

from .tuner.registration import add_peft_type

add_peft_type()  # before anything reads PeftType.SORSA

from .config import SORSAConfig  # noqa: E402
from .errors import SORSAError  # noqa: E402
from .hookspecs import hookimpl  # noqa: E402
from .layers.layer import SORSALayer  # noqa: E402
from .linalg.offset_form import holding_pairs  # noqa: E402
from .linalg.svd import captured_energy, factorise  # noqa: E402
from .qsorsa.dequantize import merge_and_dequantize  # noqa: E402
from .qsorsa.prepare import ResidualReport, init_residual  # noqa: E402
from .qsorsa.residual import quantize_residual, save_residual  # noqa: E402
from .recipes.setup_adapter import AdapterSetup, AdapterType, registered_adapters, setup_adapter  # noqa: E402
from .regularizer.attach import attach  # noqa: E402
from .regularizer.gaps import gaps  # noqa: E402
from .regularizer.step_hooks import Attachment  # noqa: E402
from .regularizer.trained_factors import orthonormality  # noqa: E402
from .tools.analysis.analyze import Analysis, analyze  # noqa: E402
from .tools.export_lora import ExportReport, export_lora  # noqa: E402
from .tools.init_adapter import InitReport, init_adapter  # noqa: E402
from .tools.merge.merge_adapter import MergeReport, merge_adapter  # noqa: E402
from .tools.plan import Plan, plan  # noqa: E402
from .tuner.model import SORSAModel  # noqa: E402
from .tuner.registration import register  # noqa: E402
from .tuner.save_adapter import save_adapter  # noqa: E402

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
