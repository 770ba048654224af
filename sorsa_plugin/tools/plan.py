"""Computes what an adapter on a model will take: parameters, bytes, memory and time, from the model's config alone.

The model and its adapter are made on the meta device, so the numbers are those of what get_peft_model makes. Two
figures are estimates and say so: activations, and the time of the factorisation. Beside it stands what a LoRA of the
same rank on the same modules takes.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from os import PathLike

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import nn

from ..config import SORSAConfig
from ..errors import SORSAConfigError
from ..files.base_checkpoint import empty_model, read_model_config
from ..files.safetensors_writer import file_header
from ..layers.factors import SORSAFactors
from ..layers.layer import sorsa_layers
from ..lora_options import lora_of
from .empty_adapter import ADAPTER, adapt_empty
from .init_time import estimate_init
from .layer_groups import LayerGroup, layer_groups
from .trained_tokens import TRAINED_TOKENS
from .training_memory import ENGINES, OPTIMIZER_STATE, Memory, estimate_activations, largest_block, memory


@dataclass(frozen=True)
class LoraPlan:
    """What a LoRA of the same rank on the same modules takes; the figures of `Plan`."""

    trainable_parameters: int
    adapter_bytes: int
    memory: Memory
    """Its activations are SORSA's estimate: both keep r numbers per token and adapted layer."""


@dataclass(frozen=True)
class Plan:
    """What `plan` found."""

    model: str
    dtype: str
    base_parameters: int
    stacked_parameters: int
    """Parameters of the base in tensors of three dimensions (fused experts) that carry no adapter."""
    trainable_parameters: int
    adapter_bytes: int
    """Size of adapter_model.safetensors, to the byte."""
    groups: tuple[LayerGroup, ...]
    gpus: int
    engine: str
    memory: Memory
    init_seconds: float
    """Estimate: sum over the adapted weights, divided by the processes that share them."""
    init_basis: str
    """What the estimate is based on, in words."""
    lora: LoraPlan | None
    """None where PEFT makes no LoRA of these options."""
    lora_refusal: str | None
    """Why PEFT makes none, in its words; None where it does."""


def plan(
    model: str | PathLike[str],
    config: SORSAConfig,
    *,
    dtype: torch.dtype | None = None,
    gpus: int = 1,
    engine: str = "ddp",
    batch: int = 1,
    length: int = 2048,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    unit_seconds: float | None = None,
    revision: str | None = None,
) -> Plan:
    """What training this adapter will take.

    Args:
        model: directory with a config.json, or an id on the hub; no weights are needed.
        config: the adapter's options.
        dtype: the dtype in which the base will be loaded; None for the config's.
        gpus: number of processes, with a GPU each.
        engine: "ddp", "fsdp2" or "zero3".
        batch, length: sequences on each GPU, and tokens in each, for the estimate of activations.
        checkpointing: whether activations are recomputed in backward.
        optimizer: "adamw", "adamw_8bit" or "sgd".
        unit_seconds: seconds to factorise one 4096 x 4096 weight at rank r on the machine that will make the adapter;
            None measures smaller weights on this machine.
        revision: of the model, on the hub.

    Raises:
        BaseFilesError: there is no such model.
        SORSAConfigError: an option has a value that cannot be honoured.
    """
    _check(gpus, engine, batch, length, optimizer, unit_seconds)
    model_config = read_model_config(model, revision)

    def adapted_by(adapter: PeftConfig) -> tuple[PeftModel, nn.Module | None]:
        """The model with an adapter, and its largest block."""
        empty = empty_model(model_config, config.task_type, dtype)
        empty.tie_weights()
        block = largest_block(empty)
        return adapt_empty(empty, adapter), block

    adapted, block = adapted_by(config)
    groups = layer_groups(adapted)
    base_dtype = adapted.get_base_model().dtype
    seconds, basis = estimate_init(groups, config, unit_seconds)
    if gpus > 1:
        seconds, basis = seconds / gpus, f"{basis}; shared by {gpus} processes"
    activations = estimate_activations(model_config, groups, base_dtype, batch, length, checkpointing)
    lora, lora_refusal = None, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a LoRA that nobody asked for
            of_lora, its_block = adapted_by(lora_of(config))
        takes = memory(of_lora, its_block, gpus, engine, optimizer, activations)
        lora = LoraPlan(_trainable(of_lora), _file_bytes(of_lora), takes)
    except SORSAConfigError as error:
        lora_refusal = str(error)
    base = [parameter for name, parameter in adapted.named_parameters() if ".sorsa_factors." not in name]
    return Plan(
        model=str(model),
        dtype=str(base_dtype).removeprefix("torch."),
        base_parameters=sum(parameter.numel() for parameter in base) - _copies(adapted),
        stacked_parameters=_stacked(adapted),
        trainable_parameters=_trainable(adapted),
        adapter_bytes=_file_bytes(adapted),
        groups=groups,
        gpus=gpus,
        engine=engine,
        memory=memory(adapted, block, gpus, engine, optimizer, activations),
        init_seconds=seconds,
        init_basis=basis,
        lora=lora,
        lora_refusal=lora_refusal,
    )


def _trainable(model: PeftModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _file_bytes(model: PeftModel) -> int:
    return file_header(get_peft_model_state_dict(model, adapter_name=ADAPTER))[2]


def _stacked(model: PeftModel) -> int:
    """Parameters in stacks of matrices that neither carry an adapter nor train; no kernels, no positions."""
    adapted = {id(layer.base_weight()) for layer in sorsa_layers(model)}
    modules = [module for module in model.modules() if not isinstance(module, (nn.Conv1d, SORSAFactors))]
    own = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    frozen = [p for p in own if not p.requires_grad and id(p) not in adapted]
    return sum(parameter.numel() for parameter in frozen if parameter.ndim == 3 and len(parameter) > 1)


def _copies(model: PeftModel) -> int:
    """Parameters of modules_to_save and rows of trained tokens, which are there twice."""
    names = dict(model.named_parameters())
    twice = (f".modules_to_save.{ADAPTER}.", f"{TRAINED_TOKENS}.{ADAPTER}")
    return sum(p.numel() for name, p in names.items() if any(part in name for part in twice))


LARGEST = 10**12
"""No count of processes, sequences or tokens is larger."""


def _check(gpus: int, engine: str, batch: int, length: int, optimizer: str, unit_seconds: float | None) -> None:
    if engine not in ENGINES:
        raise SORSAConfigError(f"engine is {engine!r}; expected one of {', '.join(map(repr, ENGINES))}.")
    if optimizer not in OPTIMIZER_STATE:
        raise SORSAConfigError(f"optimizer is {optimizer!r}; expected one of {', '.join(map(repr, OPTIMIZER_STATE))}.")
    for name, value in {"gpus": gpus, "batch": batch, "length": length}.items():
        if not 1 <= value <= LARGEST:
            raise SORSAConfigError(f"{name} is {value}; expected an integer from 1 to {LARGEST:,}.")
    if unit_seconds is not None and not 0 < unit_seconds < math.inf:  # NaN is neither
        raise SORSAConfigError(f"unit_seconds is {unit_seconds}; expected a number of seconds above 0.")
