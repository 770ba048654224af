"""Bytes that training an adapter takes on each GPU, for any PEFT adapter on a model on any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..files.adapter_format import FROZEN
from .empty_adapter import ADAPTER
from .layer_groups import LayerGroup

ENGINES = ("ddp", "fsdp2", "zero3")
OPTIMIZER_STATE = {"adamw": 2.0, "adamw_8bit": 0.5, "sgd": 0.0}
"""Bytes of optimizer state for each byte of an fp32 parameter: two moments, in fp32 or 8 bits."""


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
