"""The exact LoRA in the adapter's own directory: PEFT loads it, and it is replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders.adapters import perturb, trained
from builders.llama import TOKENS, tiny_llama
from builders.saved import FILE, digests, without
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from sorsa_plugin import save_adapter
from sorsa_plugin.errors import IncompleteAdapterError, OutputExistsError
from sorsa_plugin.tools.lora_beside import export_beside


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def assert_lora_of(model: PeftModel, directory: Path) -> None:
    """Equal up to the fp32 rounding of another order of sums: 64 products deep at most, through two blocks."""
    lora = PeftModel.from_pretrained(tiny_llama(), directory, subfolder="lora")
    assert isinstance(lora.peft_config["default"], LoraConfig)
    torch.testing.assert_close(logits(lora), logits(model), rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert float((logits(lora) - logits(model)).abs().max()) > 1e-3


def test_an_adapter_is_saved_with_its_lora_and_loads_by_itself(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path, with_lora=True)
    assert_lora_of(model, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_an_adapter_of_another_name_has_its_lora_in_its_own_folder(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), _saved(tmp_path / "first"), adapter_name="second")
    save_adapter(model, tmp_path / "both", adapter_name="second", with_lora=True)
    assert_lora_of(model, tmp_path / "both" / "second")


def _saved(directory: Path) -> Path:
    trained().save_pretrained(directory)
    return directory


def test_a_later_export_replaces_an_earlier_one(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path, with_lora=True)
    perturb(model, seed=9)
    save_adapter(model, tmp_path, with_lora=True)
    assert_lora_of(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "lora"))) == ["lora"]


def test_a_failed_export_leaves_the_earlier_one(tmp_path: Path) -> None:
    adapter = _saved(tmp_path / "adapter")
    export_beside(adapter)
    before = digests(adapter / "lora")
    save_file(without(r"layers\.0\.self_attn\.q_proj\.sorsa_factors\.S0")(load_file(adapter / FILE)), adapter / FILE)
    with pytest.raises(IncompleteAdapterError):
        export_beside(adapter)
    assert digests(adapter / "lora") == before


@pytest.mark.parametrize("held", ["somebody's LoRA", "something else"])
def test_a_folder_that_is_no_export_is_left_alone(held: str, tmp_path: Path) -> None:
    adapter = _saved(tmp_path)
    (adapter / "lora").mkdir()
    if held == "somebody's LoRA":
        (adapter / "lora" / FILE).write_bytes((adapter / FILE).read_bytes())
    else:
        (adapter / "lora" / "notes.txt").write_text("mine")
    before = digests(adapter)
    with pytest.raises(OutputExistsError, match="was not written by `sorsa export-lora`"):
        export_beside(adapter)
    assert digests(adapter) == before
