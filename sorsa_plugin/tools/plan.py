"""Computes what an adapter on a model will take: parameters, bytes, memory and time, from the model's config alone.

The model and its adapter are made on the meta device, so the numbers are those of what get_peft_model makes. Two
figures are estimates and say so: activations, and the time of the factorisation.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from ..config import SORSAConfig
from ..errors import SORSAConfigError
from ..files.adapter_format import FROZEN
from ..files.base_checkpoint import empty_model, read_model_config
from ..files.safetensors_writer import file_header
from ..layers.factors import SORSAFactors
from ..layers.kinds.lending import LendingLayer
from ..layers.layer import sorsa_layers
from ..linalg.svd import factorise, working_device
from .empty_adapter import ADAPTER, adapt_empty
from .trained_tokens import TRAINED_TOKENS

ENGINES = ("ddp", "fsdp2", "zero3")
OPTIMIZER_STATE = {"adamw": 2.0, "adamw_8bit": 0.5, "sgd": 0.0}
"""Bytes of optimizer state for each byte of an fp32 parameter: two moments, in fp32 or 8 bits."""

TIMED_ELEMENTS = 2**22
"""A weight with more elements than this is timed on a smaller one: 2048 x 2048 takes a fraction of a second."""

UNIT_SIDE = 4096
"""Factorisation speed is given as seconds for one weight of this width and height."""


@dataclass(frozen=True)
class LayerGroup:
    """Adapted matrices of one kind, shape and rank."""

    kind: str
    """Last part of the modules' or parameters' names."""
    shape: tuple[int, int]
    """(out, in)"""
    rank: int
    count: int
    """Number of matrices; every expert counts."""
    lent: bool = False
    """Whether the layer computes with its changed weight, which is kept for backward (`layers/kinds/lending.py`)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU."""

    weights: int
    """Frozen weights and buffers of the base model."""
    frozen_factors: int
    """U0, S0, V0 and fingerprints."""
    trained: int
    """Offsets and modules_to_save."""
    gradients: int
    optimizer_state: int
    communication: int
    """Estimate. DDP: buckets as large as the gradients. FSDP2 and ZeRO-3: two gathered blocks."""
    activations: int | None
    """Estimate, see `estimate_activations`; None if the config does not say how wide the model is."""

    @property
    def total(self) -> int:
        """Sum of all parts; unknown activations count as 0."""
        return sum(value or 0 for value in vars(self).values())


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
    empty = empty_model(model_config, config.task_type, dtype)
    empty.tie_weights()
    block = largest_block(empty)
    adapted = adapt_empty(empty, config)
    groups = _groups(adapted)
    layout = get_peft_model_state_dict(adapted, adapter_name=ADAPTER)
    seconds, basis = estimate_init(groups, config, unit_seconds)
    if gpus > 1:
        seconds, basis = seconds / gpus, f"{basis}; shared by {gpus} processes"
    activations = estimate_activations(model_config, groups, empty.dtype, batch, length, checkpointing)
    base = [parameter for name, parameter in adapted.named_parameters() if ".sorsa_factors." not in name]
    return Plan(
        model=str(model),
        dtype=str(empty.dtype).removeprefix("torch."),
        base_parameters=sum(parameter.numel() for parameter in base) - _copies(adapted),
        stacked_parameters=_stacked(adapted),
        trainable_parameters=sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad),
        adapter_bytes=file_header(layout)[2],
        groups=groups,
        gpus=gpus,
        engine=engine,
        memory=memory(adapted, block, gpus, engine, optimizer, activations),
        init_seconds=seconds,
        init_basis=basis,
    )


def memory(
    model: PeftModel, block: nn.Module | None, gpus: int, engine: str, optimizer: str, activations: int | None = None
) -> Memory:
    """Bytes on each GPU, from the sizes of a model's tensors on any device. `activations` is passed through.

    Under ZeRO-3 the frozen factors are buffers, so every GPU has all of them. It also has shares of fp32 masters and of
    a second copy of the gradients (docs/scaling.md, where both are measured).
    """
    factors = tuple(f".{ADAPTER}.{name}" for name in FROZEN)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    trained = sum(tensor.nbytes for tensor in tensors.values() if tensor.requires_grad)
    frozen = sum(t.nbytes for name, t in tensors.items() if ".sorsa_factors." in name and name.endswith(factors))
    weights = sum(tensor.nbytes for tensor in tensors.values()) - trained - frozen
    sharded = engine != "ddp"
    share = gpus if sharded else 1
    gathered = 2 * sum(t.nbytes for t in (*block.parameters(), *block.buffers())) if block is not None else 0
    communication = gathered if sharded else trained
    deepspeed = engine == "zero3" and gpus > 1
    state = trained * OPTIMIZER_STATE[optimizer] + (trained if deepspeed else 0)
    return Memory(
        weights=-(-weights // share),
        frozen_factors=frozen if deepspeed else -(-frozen // share),
        trained=-(-trained // share),
        gradients=-(-trained * (2 if deepspeed else 1) // share),
        optimizer_state=-(-int(state) // share),
        communication=communication if gpus > 1 else 0,
        activations=activations,
    )


def largest_block(model: nn.Module) -> nn.Module | None:
    """The largest of the repeated blocks, which FSDP2 and ZeRO-3 gather whole; None if nothing repeats."""
    blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    return max(blocks, key=lambda block: sum(p.numel() for p in block.parameters()), default=None)


def estimate_activations(
    model_config: Any,
    groups: tuple[LayerGroup, ...],
    dtype: torch.dtype,
    batch: int,
    length: int,
    checkpointing: bool,
) -> int | None:
    """A rough estimate of the bytes that a forward pass keeps for backward; None if the config gives no width or depth.

    17 numbers per token and hidden unit for each block (Korthikanti et al., 2022, arXiv 2205.05198, equation 2: 34
    bytes at 16 bits, without the attention matrix, which fused attention does not keep), r per token for each adapted
    layer, and the logits, twice in the model's dtype and twice in fp32. With checkpointing one number per block, and
    one block in full. Layers that compute with their changed weight keep that instead of r per token.
    """
    text = model_config.get_text_config()
    width, blocks, vocabulary = (
        getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")
    )
    if not width or not blocks:
        return None
    tokens, size = batch * length, dtype.itemsize
    full = 17 * width * size * blocks + sum(group.count * group.rank for group in groups if not group.lent) * size
    kept = width * size * blocks + full // blocks if checkpointing else full
    lent = sum(group.count * group.shape[0] * group.shape[1] for group in groups if group.lent) * size
    return tokens * (kept + (vocabulary or 0) * (2 * size + 8)) + (lent // blocks if checkpointing else lent)


def estimate_init(groups: tuple[LayerGroup, ...], config: SORSAConfig, unit_seconds: float | None) -> tuple[float, str]:
    """Seconds to factorise all weights one after another, and a sentence on what that is based on.

    The time of one weight grows as out * in * r, the leading term of a block iteration.
    """
    if unit_seconds is not None:
        unit = UNIT_SIDE**2 * config.r
        total = sum(g.count * unit_seconds * g.shape[0] * g.shape[1] * g.rank / unit for g in groups)
        return total, f"given: {unit_seconds:g} s for one {UNIT_SIDE} x {UNIT_SIDE} weight at rank {config.r}"
    total, timed = 0.0, {}
    factorise(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), 4)  # the first call loads libraries
    for group in groups:
        case = (group.shape, group.rank)
        if case not in timed:
            timed[case] = _seconds(group, config)
        total += group.count * timed[case]
    device = working_device(torch.device("cpu"))
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    return total, (
        f"measured on this machine's {device.type}{threads}: one random weight of each shape, larger ones in part"
    )


def _seconds(group: LayerGroup, config: SORSAConfig) -> float:
    out, inner = group.shape
    # not so small that the rank would be a large part of it: then `factorise` takes another path
    shrink = min(1.0, max((TIMED_ELEMENTS / (out * inner)) ** 0.5, 4 * group.rank / min(out, inner)))
    shape = (max(1, round(out * shrink)), max(1, round(inner * shrink)))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    factorise(weight, group.rank, svd=config.svd, energy=config.resolved_svd_energy)
    elapsed = time.perf_counter() - started
    exponent = 3 if config.svd == "exact" else 2  # a full decomposition is cubic in the side that was shrunk
    return elapsed / shrink**exponent


def _groups(model: PeftModel) -> tuple[LayerGroup, ...]:
    found: Counter[LayerGroup] = Counter()
    for layer in sorsa_layers(model):
        if ADAPTER in layer.sorsa_factors:  # tied layers use another's
            shape = (layer.out_features, layer.in_features)
            kind, rank = layer.name.rpartition(".")[2], layer.factors(ADAPTER).rank
            found[LayerGroup(kind, shape, rank, 0, isinstance(layer, LendingLayer))] += math.prod(layer.stack)
    return tuple(replace(group, count=count) for group, count in found.items())


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
