"""The runs of the trajectory tests under every engine: what trains, what it is compared with, and how closely."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

GAMMA = 0.05
STEPS = 30
SCENARIOS: dict[str, dict] = {
    "coupled": {},
    "decoupled": {"reg_update": "decoupled"},
    "coupled self-attached": {"attached": False},
    "decoupled self-attached": {"reg_update": "decoupled", "attached": False},
    "adamw": {"optim": "adamw_torch", "adam_epsilon": 1e-2},
    "bf16 coupled": {"bf16": True},
    "bf16 decoupled": {"reg_update": "decoupled", "bf16": True},
    "gamma 0": {"gamma": 0.0},
    "unclipped": {"max_grad_norm": 0.0},
    "two groups": {"groups": True},
    "attached early": {"early": True},
    "ram-efficient": {"ram_efficient": True},
    "bf16 base ram-efficient": {"ram_efficient": True, "bf16": True, "base": torch.bfloat16},
    "residual": {"residual_base": True},
    "offloaded": {"zero": {"offload_optimizer": {"device": "cpu"}}},
}

CLASSES = {"ddp": "WholeFactors", "fsdp2": "FSDP2", "zero1": "ZeRO12", "zero2": "ZeRO12", "zero3": "ZeRO3"}
"""{engine: the class that trains under it}"""

FP32 = 5e-6
"""Entries of the factors are below 1, their offsets below 0.3. Each of 30 steps rounds the offset (2^-25 of it), and
gamma P E (up to 49 terms of 0.3 at 0.05: 4e-8), at most 30 (1e-8 + 4e-8) = 2e-6 in all; the task's gradients are
below 0.02 and differ in their last digits, times the rate 1e-2."""

BF16 = 3e-5
"""A bf16 gradient differs by 2^-7 of itself when its sums are split otherwise; 30 steps of clipped gradients of norm
0.02 at a rate that falls from 1e-2 move a factor by 3e-3 at most."""


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")
