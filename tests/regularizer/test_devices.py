"""A whole step beside the CPU. The meta device stands for an accelerator: whoever reads a value there, or joins its
tensors with the CPU's, gets an error."""

from __future__ import annotations

import pytest
import torch
from builders.llama import tiny_llama
from peft import get_peft_model

from sorsa_plugin import SORSAConfig, attach


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("update", ["coupled", "decoupled"])
def test_a_training_step_waits_for_no_value_and_stays_on_its_device(
    update: str, folded: bool, dtype: torch.dtype
) -> None:
    model = get_peft_model(tiny_llama(dtype), SORSAConfig(r=4, target_modules="all-linear", reg_update=update))
    if folded:
        model.fold()
    model.to("meta").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    attachment = attach(model, optimizer)
    attachment.watch.over = True  # its norms are read, on a GPU when the next step begins
    tokens = torch.zeros((2, 5), dtype=torch.long, device="meta")
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert attachment.steps == 2
    assert attachment.penalty(optimizer).is_meta
    with torch.no_grad(), model.disable_adapter():
        assert model(tokens).logits.is_meta
