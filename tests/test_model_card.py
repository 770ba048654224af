"""The model card says how to load the adapter, once, and keeps what a person wrote."""

from __future__ import annotations

import re

import pytest
from builders.adapters import trained
from builders.llama import tiny_llama
from builders.saved import FILE
from huggingface_hub import ModelCard
from peft import get_peft_model

from sorsa_plugin import SORSAConfig
from sorsa_plugin.model_card import HEADING, complete_model_card


def test_the_model_card_says_how_to_load_the_adapter_once_however_often_it_is_saved(tmp_path):
    model = trained(gamma=0.25)
    for _ in range(3):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count(HEADING) == 1
    assert card.count("PeftModel.from_pretrained") == 2  # in the section, and where PEFT leaves room for code
    assert card.count("arXiv:2409.00055") == 1
    assert "(gamma 0.25, coupled). Rank 3" in card
    header = card.split("---")[1]
    assert len(re.findall(r"^- sorsa$", header, re.MULTILINE)) == 1


def test_a_card_that_a_person_wrote_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags:\n- mine\n---\n\n# My adapter\n\nTrained with care.\n")
    trained().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Trained with care." in card
    assert card.count(HEADING) == 1
    assert re.search(r"^- sorsa$", card.split("---")[1], re.MULTILINE)


def test_a_config_saved_alone_writes_no_card(tmp_path):
    SORSAConfig(r=2).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json"}


def test_sections_of_the_users_own_stay_in_the_card(tmp_path):
    model = trained(seed=5)
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\n## My results\n\nGood ones.\n")
    model.save_pretrained(tmp_path)
    assert card.read_text().count(HEADING) == 1
    assert card.read_text().rstrip().endswith("## My results\n\nGood ones.")


def test_an_adapter_of_another_name_has_its_section_in_the_card_that_peft_puts_beside_its_folder(tmp_path):
    base = tiny_llama()
    get_peft_model(base, SORSAConfig(r=2, target_modules=["q_proj"]), adapter_name="mine").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count(HEADING) == 1
    assert not (tmp_path / "mine" / "README.md").exists()


OTHERS_CARDS = {
    "of a project": b"# My project\n\nNotes.\n",
    "of another adapter": b"---\nlibrary_name: peft\ntags:\n- lora\n---\n\n# A LoRA\n",
    "with no metadata between its rules": b"---\nA rule: with: colons\n---\n",
    "in another encoding": "---\nlicense: mit\n---\ncaf\u00e9\n".encode("latin1"),
}


@pytest.mark.parametrize("place", ["run", "."])
@pytest.mark.parametrize("card", OTHERS_CARDS.values(), ids=OTHERS_CARDS.keys())
def test_a_card_that_nobody_wrote_for_the_adapter_is_left_alone_and_loses_no_weights(card, place, tmp_path):
    """transformers' own save_pretrained writes none, whatever lies there or in the directory above."""
    model = tiny_llama()
    model.add_adapter(SORSAConfig(r=2, target_modules=["q_proj"]))
    (tmp_path / "run").mkdir()
    (tmp_path / place / "README.md").write_bytes(card)
    model.save_pretrained(tmp_path / "run")
    assert (tmp_path / "run" / FILE).is_file()
    assert [path.read_bytes() for path in tmp_path.rglob("README.md")] == [card]


def test_the_card_in_the_folder_of_an_adapter_of_another_name_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_bytes(OTHERS_CARDS["of a project"])
    base = tiny_llama()
    get_peft_model(base, SORSAConfig(r=2, target_modules=["q_proj"]), adapter_name="mine").save_pretrained(tmp_path)
    assert (tmp_path / "mine" / "README.md").read_bytes() == OTHERS_CARDS["of a project"]
    assert (tmp_path / "README.md").read_text().count(HEADING) == 1


@pytest.mark.parametrize("name", ["with no metadata between its rules", "in another encoding"])
def test_a_card_that_cannot_be_read_stops_nobody(name, tmp_path, caplog):
    (tmp_path / "README.md").write_bytes(OTHERS_CARDS[name])
    complete_model_card(str(tmp_path), SORSAConfig(r=2).card_values())
    assert "README.md stays without SORSA's section" in caplog.text
    assert (tmp_path / "README.md").read_bytes() == OTHERS_CARDS[name]


def test_a_tag_that_a_person_wrote_as_one_word_stays_one(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: mine\n---\n\n# My adapter\n")
    complete_model_card(str(tmp_path), SORSAConfig(r=2).card_values())
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["mine", "sorsa"]
