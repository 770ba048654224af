"""The reference of a preference or policy run: the base under a fresh adapter, a frozen copy of a trained one; for
SORSA beside LoRA."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.trl_runs import METHODS, adapter_config, base_of, build, logged
from peft import PeftModel, get_peft_model

AT_THE_REFERENCE = {
    "DPO": float(torch.tensor(math.log(2.0), dtype=torch.float32)),
    "KTO": 0.5,
    "GRPO": 0.0,
    "RLOO": 0.0,
}
"""Of a policy that is its reference: the losses log 2 and 1 - sigmoid(0), and the KL divergence where there is one."""


def first_distance(trainer: Any, kind: str) -> float:
    return logged(trainer, "kl" if kind in ("GRPO", "RLOO") else "loss")[0]


def options_of(kind: str) -> dict[str, Any]:
    """GRPO has a reference only with a weight for the divergence from it."""
    return {"beta": 0.04} if kind in ("GRPO", "RLOO") else {}


def expected(kind: str, changes: dict[str, Any]) -> Any:
    """To the bit where one batch goes through both.

    Precomputed references come from other batches, whose products are summed in another order: the log-probabilities of
    27 tokens in each of two answers err by at most 1e-5 each (logits of about 10), and the loss by beta/2 of that.
    """
    value = AT_THE_REFERENCE[kind]
    return pytest.approx(value, abs=0.1 / 2 * 2 * 27 * 1e-5) if "precompute_ref_log_probs" in changes else value


def trained_adapter(method: str, directory: Path) -> PeftModel:
    """A saved adapter with a change of its own, loaded to be trained on."""
    model = get_peft_model(base_of("SFT"), adapter_config(method))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-2)
    model.save_pretrained(directory)
    return PeftModel.from_pretrained(base_of("SFT"), directory, is_trainable=True)


def tensors_of(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    return {
        name.replace(f".{adapter}", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if f".{adapter}." in name or name.endswith(f".{adapter}")
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("DPO", {}),
        ("DPO", {"precompute_ref_log_probs": True}),
        ("DPO", {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
        ("KTO", {}),
        ("GRPO", {}),
        ("RLOO", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_the_reference_of_a_fresh_adapter_is_the_base(
    kind: str, changes: dict[str, Any], method: str, tmp_path: Path
) -> None:
    trainer = build(kind, tmp_path, adapter_config(method), **options_of(kind), **changes)
    trainer.train()
    assert first_distance(trainer, kind) == expected(kind, changes)
    assert set(trainer.model.peft_config) == {"default"}
    if kind in ("DPO", "KTO"):
        assert logged(trainer, "loss")[1] < logged(trainer, "loss")[0]
    else:
        assert logged(trainer, "kl")[-1] > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("DPO", {}), ("DPO", {"precompute_ref_log_probs": True}), ("KTO", {}), ("GRPO", {}), ("RLOO", {})],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_the_reference_of_a_trained_adapter_is_a_frozen_copy_of_it(
    kind: str, changes: dict[str, Any], method: str, tmp_path: Path
) -> None:
    """Beside the base as reference, the first distance would be off."""
    model = trained_adapter(method, tmp_path / "adapter")
    trainer = build(kind, tmp_path / "run", None, model=model, **options_of(kind), **changes)
    before, copied = tensors_of(trainer.model, "default"), tensors_of(trainer.model, "ref")
    assert copied
    assert copied.keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in copied.items())
    trainer.train()
    assert first_distance(trainer, kind) == expected(kind, changes)
    after = tensors_of(trainer.model, "ref")
    assert all(torch.equal(after[name], tensor) for name, tensor in copied.items())
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert not [name for name in trained if ".ref" in name]
    moved = tensors_of(trainer.model, "default")
    assert {name for name, tensor in moved.items() if not torch.equal(tensor, before[name])} == {
        name.replace(".default", "") for name in trained
    }
