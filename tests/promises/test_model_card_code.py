"""A reader copies the code of a model card and it runs, whoever wrote the card, and the card names nobody's folders."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builders.adapters import perturb
from builders.llama import token_batches
from builders.trainer_runs import arguments
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from transformers import Trainer

from sorsa_plugin import SORSAConfig, save_adapter
from sorsa_plugin.model_card import HEADING
from sorsa_plugin.tools.lora_beside import export_beside
from sorsa_quickstart import answering
from sorsa_quickstart.answering import load_base
from sorsa_quickstart.task import train_examples
from sorsa_transformers import SORSACallback

BASE = Path(answering.__file__).parent / "base"
LORA_LINE = 'PeftModel.from_pretrained(base, ".", subfolder="lora")'


def config() -> SORSAConfig:
    return SORSAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def saved(directory: Path, **options: object) -> PeftModel:
    model = get_peft_model(load_base()[0], config())
    perturb(model)
    save_adapter(model, directory, **options)
    return model


def hf_trainer(directory: Path) -> Trainer:
    model = get_peft_model(load_base()[0], config())
    return Trainer(model, arguments(directory, output_dir=str(directory), max_steps=1), train_dataset=token_batches(8))


def sft_trainer(directory: Path) -> Trainer:
    trl = pytest.importorskip("trl")
    model, tokenizer = load_base()
    options = {"bf16": False, "use_cpu": True, "max_steps": 1, "report_to": "none"}
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(str(directory), per_device_train_batch_size=2, **options),
        train_dataset=Dataset.from_list(train_examples(4)),
        processing_class=tokenizer,
        peft_config=config(),
    )


def trained(make: Callable[[Path], Trainer], directory: Path, callback: str) -> Trainer:
    trainer = make(directory)
    if callback != "none":
        trainer.add_callback(SORSACallback(trainer if callback == "with trainer" else None))
    trainer.train()
    trainer.save_model()
    return trainer


def code_blocks(directory: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), flags=re.DOTALL)


def run(code: str, directory: Path) -> str:
    """Output of code in a fresh process, in the adapter's directory, where `base` is the base model."""
    if not (directory / "base").exists():
        (directory / "base").symlink_to(BASE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=directory)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def require_readers_card(directory: Path) -> str:
    card = ModelCard.load(directory / "README.md")
    assert card.text.count(HEADING) == 1
    assert card.text.index("\n## ") == card.text.index(f"\n{HEADING}"), "another section stands above"
    assert str(BASE) not in card.content
    assert str(directory.parent) not in card.content
    assert 'model="None"' not in card.text
    assert "(https://huggingface.co/None)" not in card.text
    assert "import sorsa_plugin" not in card.text
    assert card.data.base_model is None
    return card.text


def test_the_code_of_a_saved_adapters_card_runs(tmp_path: Path) -> None:
    saved(tmp_path)
    text = require_readers_card(tmp_path)
    blocks = code_blocks(tmp_path)
    assert len(blocks) == 2
    started = text.partition("## How to Get Started with the Model")[2].partition("\n## ")[0]
    assert blocks[1] in started
    assert "More Information Needed" not in started
    check = "print(type(model.peft_config['default']).__name__)"
    assert run("".join([*blocks, check]), tmp_path).splitlines()[-1] == "SORSAConfig"


@pytest.mark.slow
@pytest.mark.parametrize("callback", ["none", "plain", "with trainer"])
@pytest.mark.parametrize("make", [hf_trainer, sft_trainer])
def test_the_code_of_a_trainers_card_runs(make: Callable[[Path], Trainer], callback: str, tmp_path: Path) -> None:
    trainer = trained(make, tmp_path, callback)
    for _ in range(2):  # what push_to_hub does after saving, and before it uploads the directory
        trainer.create_model_card(model_name="mine", tags=["own-tag"])
        require_readers_card(tmp_path)
    assert "sorsa" in ModelCard.load(tmp_path / "README.md").data.tags
    blocks = code_blocks(tmp_path)
    assert blocks
    if callback == "none":  # the cards of the others are the same
        run("".join(blocks), tmp_path)


@pytest.mark.slow
def test_an_adapter_of_another_name_is_loaded_from_its_folder(tmp_path: Path) -> None:
    get_peft_model(load_base()[0], config(), adapter_name="mine").save_pretrained(tmp_path)
    require_readers_card(tmp_path)
    assert run(code_blocks(tmp_path)[0] + "print(model.peft_config['default'].r)", tmp_path).splitlines()[-1] == "2"


@pytest.mark.slow
def test_a_task_without_a_type_is_loaded_by_the_base_models_class(tmp_path: Path) -> None:
    model = get_peft_model(load_base()[0], SORSAConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    loaded = run(code_blocks(tmp_path)[0] + "print(type(base).__name__)", tmp_path)
    assert loaded.splitlines()[-1] == type(model.get_base_model()).__name__


@pytest.mark.slow
@pytest.mark.parametrize("when", ["with the adapter", "after it"])
def test_the_first_lines_name_the_lora_beside_the_adapter(when: str, tmp_path: Path) -> None:
    model = saved(tmp_path, with_lora=when == "with the adapter")
    if when == "after it":
        assert LORA_LINE not in (tmp_path / "README.md").read_text()
        export_beside(tmp_path)
    section = require_readers_card(tmp_path).partition(HEADING)[2]
    assert section.lstrip().startswith("PEFT alone loads exactly this adapter, as a LoRA")
    assert LORA_LINE in section
    make_base = re.search(r"^base = .*$", section, flags=re.MULTILINE).group()
    code = f"""
import os; os.environ["SORSA_AUTOLOAD"] = "0"
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
{make_base}
model = {LORA_LINE}
print(model.peft_config["default"].peft_type.value, "sorsa_plugin" in sys.modules)
"""
    assert run(code, tmp_path).splitlines()[-1] == "LORA False"
    export_beside(tmp_path, rank=1)
    assert "PEFT alone loads a truncated LoRA of this adapter" in require_readers_card(tmp_path)
    model.save_pretrained(tmp_path)  # the LoRA is no longer that of this file
    assert LORA_LINE not in require_readers_card(tmp_path)


@pytest.mark.parametrize("local", [False, True])
def test_a_base_model_of_the_hub_is_named_and_a_local_one_is_not(local: bool, tmp_path: Path) -> None:
    model = load_base()[0]
    model.config._name_or_path = model.name_or_path = str(BASE) if local else "someone/a-model"
    get_peft_model(model, config()).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == (None if local else "someone/a-model")
    assert any(tag.startswith("base_model:") for tag in card.data.tags) is not local
    assert ('from_pretrained("someone/a-model")' in card.text) is not local
