"""The card that a trainer writes before it uploads an adapter still says what SORSA is and how to load it."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.llama import tiny_llama, token_batches
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from sorsa_plugin import SORSAConfig
from sorsa_plugin.model_card import HEADING
from sorsa_quickstart.answering import load_base
from sorsa_quickstart.task import train_examples
from sorsa_transformers import SORSACallback

OPTIONS = {"max_steps": 1, "save_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}


def hf_trainer(directory: Path) -> Trainer:
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj"], gamma=0.25, task_type="CAUSAL_LM"))
    return Trainer(model, TrainingArguments(str(directory), **OPTIONS), train_dataset=token_batches(8))


def sft_trainer(directory: Path) -> Trainer:
    model, tokenizer = load_base()
    return SFTTrainer(
        model,
        args=SFTConfig(str(directory), bf16=False, per_device_train_batch_size=2, **OPTIONS),
        train_dataset=Dataset.from_list(train_examples(4)),
        processing_class=tokenizer,
        peft_config=SORSAConfig(r=2, target_modules=["q_proj"], gamma=0.25, task_type="CAUSAL_LM"),
    )


@pytest.mark.parametrize("make", [hf_trainer, sft_trainer])
def test_the_card_written_for_the_hub_has_the_section_and_the_trainers_own_text(make, tmp_path):
    trainer = make(tmp_path)
    trainer.add_callback(SORSACallback(trainer))
    trainer.train()
    trainer.save_model()
    for _ in range(2):  # what push_to_hub does after saving, and before it uploads the directory
        trainer.create_model_card(model_name="mine", tags=["own-tag"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count(HEADING) == 1
    for text in ("(gamma 0.25, coupled). Rank 2", "pip install sorsa-plugin", "sorsa export-lora", "arXiv:2409.00055"):
        assert text in card.text
    assert "sorsa" in card.data.tags
    assert {"trl", "own-tag"}.issubset(card.data.tags) == (make is sft_trainer)  # for others PEFT drops all tags
    assert "Framework versions" in card.text  # the trainer's part
    assert not (tmp_path / "checkpoint-1" / "README.md").read_text().count(HEADING) > 1


@pytest.mark.parametrize("kind", ["a directory", "a file that is gone", "an id of the hub"])
def test_a_card_names_data_of_the_hub_alone(kind, tmp_path):
    data = {
        "a directory": str(tmp_path),
        "a file that is gone": "/home/somebody/secret/train.jsonl",
        "an id of the hub": "trl-lib/Capybara",
    }[kind]
    trainer = sft_trainer(tmp_path / "run")
    trainer.save_model()
    trainer.create_model_card(model_name="mine", dataset_name=data)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert (data in card.content) == (kind == "an id of the hub")
    assert HEADING in card.text
