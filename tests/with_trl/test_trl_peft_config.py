"""TRL's trainers with `peft_config=SORSAConfig(...)` alone: regularized, DPO's reference exact, a trained adapter's
"ref" copy equal to it and never trained; and the SFT options that touch the model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from builders.adapters import perturb
from builders.trl_runs import EXAMPLES, adapter_tensors, build, logged, options, sorsa_config
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import DPOTrainer, SFTConfig, SFTTrainer

from sorsa_plugin import gaps
from sorsa_plugin.files.adapter_format import OFFSETS
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_plugin.regularizer.trained_factors import model_factors
from sorsa_quickstart.answering import load_base

LN2 = float(torch.tensor(math.log(2.0), dtype=torch.float32))


def loss_of_equals(changes):
    """DPO's loss while policy and reference are one: log 2, to the bit where one batch goes through both.

    Precomputed references come from other batches, whose products are summed in another order: the log-probabilities of
    27 tokens in each of two answers err by at most 1e-5 each (logits of about 10), and the loss by beta/2 of that.
    """
    return pytest.approx(LN2, abs=0.1 / 2 * 2 * 27 * 1e-5) if "precompute_ref_log_probs" in changes else LN2


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
    assert logged(trainer, "loss")[0] == loss_of_equals(changes)
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]


@pytest.mark.parametrize("changes", [{}, {"precompute_ref_log_probs": True}], ids=["plain", "precomputed reference"])
def test_dpo_on_a_trained_adapter_refers_to_a_frozen_copy_of_it(changes, tmp_path):
    model = get_peft_model(load_base()[0], sorsa_config())
    perturb(model, scale=1e-2)  # beside the base as reference, the first loss would be off by 2e-3
    model.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(load_base()[0], tmp_path / "adapter", is_trainable=True)
    trainer = build(DPOTrainer, tmp_path / "run", None, model=model, **changes)
    layers = sorsa_layers(trainer.model)
    copied = adapter_tensors(trainer, "ref")
    assert all(torch.equal(a, b) for a, b in zip(adapter_tensors(trainer), copied, strict=True))
    assert len(model_factors(trainer.model)) == 2 * len(layers)  # the copy does not count
    trainer.train()
    assert logged(trainer, "loss")[0] == loss_of_equals(changes)
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


def reload_and_compare(trainer, directory, base, tokens):
    """The saved adapter on the base with the new vocabulary gives the trained model's logits, bit for bit."""
    trainer.save_model(str(directory))
    loaded = PeftModel.from_pretrained(base, directory)
    inputs = {"input_ids": torch.tensor([tokens])}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, trainer.model.eval()(**inputs).logits)


def untied_base():
    """The embedded architecture with an output layer of its own, random weights: TRL 1.16 reads the output layer's
    bias, which PEFT's wrapper around tied new tokens does not have, with LoRA neither."""
    base, tokenizer = load_base()
    base.config.tie_word_embeddings = False
    torch.manual_seed(0)
    return type(base)(base.config), tokenizer


def test_new_tokens_are_trained_beside_sorsa(tmp_path):
    base, tokenizer = untied_base()
    tokenizer.add_tokens(["<think>"])
    new = tokenizer.convert_tokens_to_ids("<think>")
    base.resize_token_embeddings(len(tokenizer))
    resized = copy.deepcopy(base)
    rows = [{**row, "completion": "<think>" + row["completion"]} for row in EXAMPLES]
    trainer = SFTTrainer(
        base,
        args=SFTConfig(**options(tmp_path / "run")),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=sorsa_config(trainable_token_indices={"embed_tokens": [new]}),
    )
    trainer.train()
    merged = copy.deepcopy(trainer.model).merge_and_unload().get_input_embeddings().weight
    original = resized.get_input_embeddings().weight
    assert not torch.equal(merged[new], original[new])
    others = torch.arange(len(original)) != new
    assert torch.equal(merged[others], original[others])
    reload_and_compare(trainer, tmp_path / "adapter", resized, [5, new, 7])


def test_the_tokens_of_a_cloned_chat_template_are_trained_beside_sorsa(tmp_path):
    """TRL adds them to the vocabulary and to the config's trainable_token_indices by itself."""
    model, template = untied_base()
    base = copy.deepcopy(model)
    template.add_tokens(["<|turn|>"], special_tokens=True)
    template.chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    template.save_pretrained(tmp_path / "template")
    trainer = build(
        SFTTrainer,
        tmp_path / "run",
        sorsa_config(modules_to_save=["lm_head"]),
        model=model,
        rows=CHATS,
        chat_template_path=str(tmp_path / "template"),
        eval_strategy="no",
    )
    trainer.train()
    tokens = trainer.model.peft_config["default"].trainable_token_indices["embed_tokens"]
    assert template.convert_tokens_to_ids("<|turn|>") in tokens
    base.resize_token_embeddings(trainer.model.get_input_embeddings().weight.shape[0])
    # the new rows of the embedding start anew here; what was trained of them is in the adapter
    reload_and_compare(trainer, tmp_path / "adapter", base, [5, tokens[0], 7])
