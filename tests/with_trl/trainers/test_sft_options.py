"""Options of SFT and of PEFT that touch the model, for SORSA beside LoRA: each trains, keeps the base, saves, loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.models import tiny_qwen3_moe
from builders.trl_runs import EXAMPLES, METHODS, adapter_config, base_of, build, logged, logits_of
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from sorsa_quickstart.answering import load_base

CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }
    for row in EXAMPLES[:4]
]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)

pytestmark = pytest.mark.parametrize("method", METHODS)


def adapter_dtypes(model: PeftModel) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}


def assert_saved_exactly(trainer: Any, directory: Path, base: PreTrainedModel, tokens: list[int]) -> PeftModel:
    """What the trainer saves, on a fresh base, gives the trained model's logits, bit for bit."""
    trainer.save_model(str(directory))
    loaded = PeftModel.from_pretrained(base, directory)
    inputs = {"input_ids": torch.tensor([tokens])}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, trainer.model.eval()(**inputs).logits)
    return loaded


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "max_length": 128},
        {"padding_free": True, "max_length": None},
        {"assistant_only_loss": True},
        {"completion_only_loss": False},
        {"bf16": True},
        {"gradient_checkpointing": True},
    ],
    ids=["packing", "padding-free", "assistant-only loss", "loss on the prompt too", "bf16", "gradient checkpointing"],
)
def test_the_loss_falls_in_fp32_and_the_base_is_untouched(changes: dict[str, Any], method: str, tmp_path: Path) -> None:
    model, tokenizer = load_base()
    rows = EXAMPLES[:4]  # one batch: the losses of the steps can be compared
    if "assistant_only_loss" in changes:
        rows, tokenizer.chat_template = CHATS, TEMPLATE
    before = copy.deepcopy(model.state_dict())
    config = adapter_config(method)
    trainer = build("SFT", tmp_path, config, model=model, tokenizer=tokenizer, rows=rows, **changes)
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    assert adapter_dtypes(trainer.model) == {torch.float32}
    restored = trainer.model.unload().state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in before.items())


def test_a_model_that_has_an_adapter_is_trained_on(method: str, tmp_path: Path) -> None:
    """It is not wrapped again, and a config beside it is refused."""
    model = get_peft_model(base_of("SFT"), adapter_config(method))
    trainer = build("SFT", tmp_path / "run", None, model=model, rows=EXAMPLES[:4])
    trainer.train()
    assert trainer.model is model
    assert set(model.peft_config) == {"default"}
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    loaded = assert_saved_exactly(trainer, tmp_path / "adapter", base_of("SFT"), [5, 6, 7])
    assert not torch.equal(logits_of(loaded), logits_of(base_of("SFT")))
    with pytest.raises(ValueError, match="`PeftModel` instance together with a `peft_config`"):
        build("SFT", tmp_path / "again", adapter_config(method), model=model)


def test_modules_to_save_are_trained_saved_and_loaded(method: str, tmp_path: Path) -> None:
    config = adapter_config(method, modules_to_save=["lm_head"], target_modules=["q_proj"])
    trainer = build("SFT", tmp_path / "run", config)
    trainer.train()
    base = base_of("SFT")
    original = base.lm_head.weight.detach().clone()
    loaded = assert_saved_exactly(trainer, tmp_path / "adapter", base, [5, 6, 7])
    trained = trainer.model.base_model.model.lm_head.modules_to_save["default"].weight
    assert not torch.equal(trained, original)
    assert torch.equal(loaded.base_model.model.lm_head.modules_to_save["default"].weight, trained)


def test_the_output_layer_is_refused_as_a_target(method: str, tmp_path: Path) -> None:
    """TRL's loss reads its weight past the adapter."""
    with pytest.raises(ValueError, match=r"`lm_head` is wrapped by a PEFT adapter|a PEFT adapter to `lm_head`"):
        build("SFT", tmp_path, adapter_config(method, target_modules=["q_proj", "lm_head"]))


def test_experts_are_trained_by_target_parameters(method: str, tmp_path: Path) -> None:
    """Weights without a module of their own, in a model of experts with the embedded base's vocabulary."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    base = tiny_qwen3_moe(vocab_size=768)
    before = copy.deepcopy(base)
    config = adapter_config(method, target_modules=[], target_parameters=parameters)
    trainer = build("SFT", tmp_path / "run", config, model=base, rows=EXAMPLES[:4], learning_rate=1e-2)
    trainer.train()
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("experts" in name for name in names)
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    assert_saved_exactly(trainer, tmp_path / "adapter", before, [5, 6, 7])


def untied_base() -> tuple[PreTrainedModel, Any]:
    """The embedded architecture with an output layer of its own, random weights: TRL 1.16 reads the output layer's
    bias, which PEFT's wrapper around tied new tokens does not have, with LoRA neither."""
    base, tokenizer = load_base()
    base.config.tie_word_embeddings = False
    torch.manual_seed(0)
    return type(base)(base.config), tokenizer


def test_new_tokens_are_trained_beside_the_adapter(method: str, tmp_path: Path) -> None:
    base, tokenizer = untied_base()
    tokenizer.add_tokens(["<think>"])
    new = tokenizer.convert_tokens_to_ids("<think>")
    base.resize_token_embeddings(len(tokenizer))
    resized = copy.deepcopy(base)
    rows = [{**row, "completion": "<think>" + row["completion"]} for row in EXAMPLES[:4]]
    config = adapter_config(method, trainable_token_indices={"embed_tokens": [new]})
    trainer = build("SFT", tmp_path / "run", config, model=base, tokenizer=tokenizer, rows=rows)
    trainer.train()
    merged = copy.deepcopy(trainer.model).merge_and_unload().get_input_embeddings().weight
    original = resized.get_input_embeddings().weight
    assert not torch.equal(merged[new], original[new])
    others = torch.arange(len(original)) != new
    assert torch.equal(merged[others], original[others])
    assert_saved_exactly(trainer, tmp_path / "adapter", resized, [5, new, 7])


def test_the_tokens_of_a_cloned_chat_template_are_trained_beside_the_adapter(method: str, tmp_path: Path) -> None:
    """TRL adds them to the vocabulary and to the config's trainable_token_indices by itself."""
    model, template = untied_base()
    base = copy.deepcopy(model)
    template.add_tokens(["<|turn|>"], special_tokens=True)
    template.chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    template.save_pretrained(tmp_path / "template")
    config = adapter_config(method, modules_to_save=["lm_head"])
    changes = {"chat_template_path": str(tmp_path / "template")}
    trainer = build("SFT", tmp_path / "run", config, model=model, rows=CHATS, **changes)
    trainer.train()
    tokens = trainer.model.peft_config["default"].trainable_token_indices["embed_tokens"]
    assert template.convert_tokens_to_ids("<|turn|>") in tokens
    base.resize_token_embeddings(trainer.model.get_input_embeddings().weight.shape[0])
    # the new rows of the embedding start anew here; what was trained of them is in the adapter
    assert_saved_exactly(trainer, tmp_path / "adapter", base, [5, tokens[0], 7])
