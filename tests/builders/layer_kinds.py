"""One tiny base model per layer kind, its input, and how it is targeted; knows nothing of this package, so that plain
PEFT can be tried on the same models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

EXPERTS = 3


class Around(nn.Module):
    """A model of one module, `inner`, whose first output it gives."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if self.call is None else self.call(self.inner, x)


@dataclass
class Kind:
    """How to make the base module, what to feed it, and how to target it."""

    make: Callable[[], nn.Module]
    sample: Callable[[torch.Generator], torch.Tensor]
    options: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["inner"]})
    call: Callable[..., Any] | None = None
    exported: bool = True
    """Whether LoRA has this kind too, and computes with it as SORSA does."""
    lends: bool = False
    """Whether it computes with its changed weight, so that neither dropout nor mixed batches make sense."""


def _tokens(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 20, (3, 7), generator=generator)


def _signal(*shape: int) -> Callable[[torch.Generator], torch.Tensor]:
    return lambda generator: torch.randn(shape, generator=generator)


def _experts(config_class: type, module: type) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = config_class(hidden_size=8, intermediate_size=10, num_local_experts=EXPERTS)
        config._experts_implementation = "eager"
        experts = module(config)
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.3)
        return experts

    return make


def _routed(experts: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Each token to two experts, with fixed weights."""
    choice = torch.arange(len(x))
    index = torch.stack([choice % EXPERTS, (choice + 1) % EXPERTS], dim=1)
    return experts(x, index, torch.tensor([0.7, 0.3], dtype=x.dtype).expand(len(x), 2))


def _attended(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return attention(x, x, x, need_weights=False)[0]


BOTH = {"target_modules": [], "target_parameters": ["inner.gate_up_proj", "inner.down_proj"]}

KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(8, 6), _signal(3, 5, 8)),
    "transformers Conv1D": Kind(
        lambda: Conv1D(6, 8), _signal(3, 5, 8), {"target_modules": ["inner"], "fan_in_fan_out": True}
    ),
    "embedding": Kind(lambda: nn.Embedding(20, 12, padding_idx=1), _tokens),
    "scaled embedding": Kind(lambda: Gemma3TextScaledWordEmbedding(20, 12, 0, embed_scale=3.5), _tokens),
    "positions": Kind(
        lambda: OPTLearnedPositionalEmbedding(20, 12),
        lambda g: torch.ones(3, 7, dtype=torch.long),
        exported=False,
        lends=True,
    ),
    "conv1d": Kind(lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), _signal(3, 6, 9)),
    "conv2d": Kind(lambda: nn.Conv2d(3, 8, (2, 3), bias=False), _signal(2, 3, 6, 5)),
    "conv2d pointwise": Kind(lambda: nn.Conv2d(6, 8, 1), _signal(2, 6, 4, 4)),
    "conv3d": Kind(lambda: nn.Conv3d(2, 6, 2), _signal(2, 2, 4, 4, 4)),
    "dilated conv2d": Kind(
        lambda: nn.Conv2d(3, 8, 3, dilation=2, padding="same", padding_mode="reflect"),
        _signal(2, 3, 7, 7),
        exported=False,
    ),
    "grouped conv1d": Kind(lambda: nn.Conv1d(6, 8, 3, groups=2), _signal(3, 6, 9), exported=False, lends=True),
    "attention": Kind(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        _signal(2, 5, 8),
        call=_attended,
        exported=False,
        lends=True,
    ),
    "experts": Kind(_experts(MixtralConfig, MixtralExperts), _signal(7, 8), BOTH, _routed, lends=True),
    "transposed experts": Kind(_experts(GptOssConfig, GptOssExperts), _signal(7, 8), BOTH, _routed, lends=True),
    "matrix parameter": Kind(
        lambda: nn.Linear(8, 6),
        _signal(4, 8),
        {"target_modules": [], "target_parameters": ["inner.weight"]},
        lends=True,
    ),
}


def make_model(name: str, dtype: torch.dtype = torch.float32) -> Around:
    """The frozen base model of a kind: torch's attention computes otherwise where its own weights need gradients."""
    torch.manual_seed(0)
    kind = KINDS[name]
    return Around(kind.make(), kind.call).to(dtype).eval().requires_grad_(False)


def sample(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = KINDS[name].sample(torch.Generator().manual_seed(5))
    return x.to(dtype) if x.is_floating_point() else x
