"""TRL's trainers with `peft_config=SORSAConfig(...)` alone: regularized, DPO's reference exact, a trained adapter's
"ref" copy equal to it and never trained; and the SFT options that touch the model."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import perturb
from trl import DPOTrainer, SFTTrainer
from trl_runs import EXAMPLES, adapter_tensors, build, logged, sorsa_config

from sorsa_plugin import gaps
from sorsa_plugin.factors import OFFSETS
from sorsa_plugin.regularizer import model_factors, sorsa_layers
from sorsa_quickstart.answering import load_base

LN2 = float(torch.tensor(math.log(2.0), dtype=torch.float32))


def test_sft_trains_and_is_regularized(tmp_path):
    regularized = build(SFTTrainer, tmp_path / "a", sorsa_config(), gradient_accumulation_steps=2)
    without = build(SFTTrainer, tmp_path / "b", sorsa_config(gamma=0.0), gradient_accumulation_steps=2)
    regularized.train()
    without.train()
    assert len(logged(regularized, "loss")) == 3
    assert logged(regularized, "loss")[-1] < logged(regularized, "loss")[0]
    assert sum(gaps(regularized.model).values()) < sum(gaps(without.model).values())


@pytest.mark.parametrize(
    "changes",
    [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}],
    ids=["plain", "precomputed reference", "gradient checkpointing", "accumulation"],
)
def test_dpos_reference_is_the_untouched_base(changes, tmp_path):
    trainer = build(DPOTrainer, tmp_path, sorsa_config(), **changes)
    trainer.train()
    # policy and reference are bit-equal, so every margin is 0 and the loss log(2), rounded to fp32
    assert logged(trainer, "loss")[0] == LN2
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]


@pytest.mark.parametrize("changes", [{}, {"precompute_ref_log_probs": True}], ids=["plain", "precomputed reference"])
def test_dpo_on_a_trained_adapter_refers_to_a_frozen_copy_of_it(changes, tmp_path):
    model = get_peft_model(load_base()[0], sorsa_config())
    perturb(model, scale=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(load_base()[0], tmp_path / "adapter", is_trainable=True)
    trainer = build(DPOTrainer, tmp_path / "run", None, model=model, **changes)
    layers = sorsa_layers(trainer.model)
    copied = adapter_tensors(trainer, "ref")
    assert all(torch.equal(a, b) for a, b in zip(adapter_tensors(trainer), copied, strict=True))
    assert len(model_factors(trainer.model)) == 2 * len(layers)  # the copy does not count
    trainer.train()
    assert logged(trainer, "loss")[0] == LN2
    assert all(torch.equal(a, b) for a, b in zip(adapter_tensors(trainer, "ref"), copied, strict=True))
    for layer in layers:
        trained, frozen = layer.factors("default"), layer.factors("ref")
        assert any(not torch.equal(getattr(trained, name), getattr(frozen, name)) for name in OFFSETS)


CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }
    for row in EXAMPLES
]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "max_length": 128},
        {"assistant_only_loss": True},
        {"completion_only_loss": False},
        {"bf16": True},
        {"gradient_checkpointing": True},
    ],
    ids=["packing", "assistant-only loss", "loss on the prompt too", "bf16", "gradient checkpointing"],
)
def test_sft_options_that_touch_the_model(changes, tmp_path):
    """Each trains and is regularized; the offsets stay fp32 and the base untouched."""
    model, tokenizer = load_base()
    rows = EXAMPLES
    if "assistant_only_loss" in changes:
        rows, tokenizer.chat_template = CHATS, TEMPLATE
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    from datasets import Dataset
    from trl import SFTConfig
    from trl_runs import options

    trainer = SFTTrainer(
        model,
        args=SFTConfig(**options(tmp_path, **changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=sorsa_config(),
    )
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    layers = sorsa_layers(trainer.model)
    assert all(layer.factors("default").dU.dtype == torch.float32 for layer in layers)
    assert any(layer.factors("default").dU.abs().max() > 0 for layer in layers)
    restored = trainer.model.unload().state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in before.items())


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path):
    trainer = build(SFTTrainer, tmp_path / "run", sorsa_config(modules_to_save=["lm_head"], target_modules=["q_proj"]))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    base, tokenizer = load_base()
    original = base.lm_head.weight.detach().clone()
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    trained = trainer.model.base_model.model.lm_head.modules_to_save["default"].weight
    assert not torch.equal(trained, original)
    assert torch.equal(loaded.base_model.model.lm_head.modules_to_save["default"].weight, trained)
    inputs = tokenizer("Tom had 3", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, trainer.model.eval()(**inputs).logits)
