"""Quantised layers and models of every kind, with the errors that their storage may have."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from builders.llama import tiny_llama
from builders.one_layer import OneLayer

OUT, IN = 64, 128
"""Multiples of bitsandbytes' block, and of the 32 rows that its CPU kernel wants."""

FOUR_BITS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4-double": {"quant_type": "nf4"},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "fp4-double": {"quant_type": "fp4"},
    "nf4-in-bfloat16": {"quant_type": "nf4", "quant_storage": torch.bfloat16},
    "nf4-in-float32": {"quant_type": "nf4", "compress_statistics": False, "quant_storage": torch.float32},
}
EIGHT_BITS = {"int8": 0.0, "int8-outliers": 6.0}
"""The threshold above which activations are multiplied in 16 bits."""
TORCHAO = {"torchao-rows": None, "torchao-groups": 32}
"""Columns that share a scale; None: the whole row."""


def kinds(*names: str) -> list[Any]:
    """Parameters of a test: these kinds, those of a library that is not installed skipped."""
    absent = importlib.util.find_spec("torchao") is None
    skip = pytest.mark.skipif(absent, reason="torchao is not installed")
    return [pytest.param(name, marks=skip) if name in TORCHAO else name for name in names]


KINDS = kinds(*FOUR_BITS, *EIGHT_BITS, *TORCHAO)

NF4_STEP, FP4_STEP = 0.3038, 0.3334
"""The largest distance of neighbouring codes, as a share of a block's largest magnitude (-1 to -0.696; 1 to 2/3)."""


def quantised_linear(
    kind: str, seed: int = 0, bias: bool = True, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> nn.Linear:
    """A random linear layer (IN to OUT) whose weight has rows of norm about `scale`, quantised."""
    generator = torch.Generator().manual_seed(seed)
    plain = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(OUT, IN, generator=generator) * IN**-0.5 * scale)
        if bias:
            plain.bias.copy_(torch.randn(OUT, generator=generator))
    if kind in TORCHAO:
        return _torchao(plain, TORCHAO[kind])
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    if kind in FOUR_BITS:
        layer: nn.Linear = Linear4bit(IN, OUT, bias=bias, **FOUR_BITS[kind])
        # no repacking in eval mode, so that a base alone is a reference: see the kind's docstring
        layer.support_avx512bf16_for_cpu = False
    else:
        layer = Linear8bitLt(IN, OUT, bias=bias, has_fp16_weights=False, threshold=EIGHT_BITS[kind])
    layer.to(dtype).load_state_dict(plain.state_dict())
    return layer.to("cpu")


def _torchao(plain: nn.Linear, group: int | None) -> nn.Linear:
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow, quantize_

    model = nn.Sequential(plain)
    quantize_(model, Int8WeightOnlyConfig(granularity=PerRow() if group is None else PerGroup(group)))
    return model[0]


def quantised_base(kind: str, seed: int = 0, **options: Any) -> OneLayer:
    return OneLayer(quantised_linear(kind, seed, **options))


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor that the base layers' quantised weights are made of, by name."""
    found = {}
    for name, module in model.named_modules():
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        weight = getattr(base, "weight", None)
        if not isinstance(weight, torch.Tensor):
            continue
        for part, tensor in _parts(base, weight).items():
            found[f"{name}.{part}"] = copy.deepcopy(tensor.detach())
    return found


def _parts(base: Any, weight: Any) -> dict[str, torch.Tensor]:
    if hasattr(weight, "qdata"):
        return {"qdata": weight.qdata, "scale": weight.scale}
    parts = {"weight": weight.data.view(torch.uint8) if hasattr(weight, "quant_state") else weight.data}
    state = getattr(weight, "quant_state", None)
    if state is not None:
        parts |= {"absmax": state.absmax, **({"nested": state.state2.absmax} if state.nested else {})}
    if hasattr(weight, "SCB"):
        parts["scales"] = weight.SCB if weight.SCB is not None else base.state.SCB
    return parts


def rounding_bound(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """Elementwise bound on the error of storing a matrix (out x in, float64) quantised.

    Half a step of the code, times the largest magnitude of the block; the scale itself rounded in double
    quantisation (8 bits of the largest deviation of 256 scales: under 1/127 of the largest scale, with room for the
    uneven code), int8 rounds the weight to fp16 first (2^-11).
    """
    if kind in FOUR_BITS:
        blocks = weight.reshape(-1, 64).abs().amax(1, keepdim=True)
        step = NF4_STEP if kind.startswith("nf4") else FP4_STEP
        double = FOUR_BITS[kind].get("compress_statistics", True)
        slack = 2 / 127 * blocks.max() if double else 1e-6 * blocks
        return ((step / 2) * blocks + slack).expand(-1, 64).reshape(weight.shape)
    columns = TORCHAO.get(kind) or weight.shape[1]
    rows = weight.reshape(weight.shape[0], -1, columns).abs().amax(2, keepdim=True)
    return (rows * (0.5 / 127 + 2**-10)).expand(-1, -1, columns).reshape(weight.shape)


def save_llama(directory: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> str:
    """A random Llama whose projections fit the blocks, saved in full precision."""
    tiny_llama(dtype, seed, hidden=64, intermediate=128).save_pretrained(directory)
    return str(directory)


CONFIGS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}


def load_llama(directory: str, kind: str = "4bit", dtype: torch.dtype = torch.float32) -> Any:
    """The saved Llama with its projections quantised by bitsandbytes, as users load it."""
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=BitsAndBytesConfig(**CONFIGS[kind]), dtype=dtype
    )
