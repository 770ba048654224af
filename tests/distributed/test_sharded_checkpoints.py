"""Checkpoints in pieces become an adapter; test_resume_engines.py has those that several processes wrote."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.llama import tiny_llama
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_distributed.sharded_checkpoints import adapter_tensors, complete_sharded_checkpoint
from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import ForeignAdapterError, IncompleteAdapterError, MissingPackageError, OutputExistsError
from sorsa_transformers import convert_checkpoint


def adapted(adapter_name: str = "default") -> PeftModel:
    torch.manual_seed(0)
    config = SORSAConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], init_weights=False)
    return get_peft_model(tiny_llama(), config, adapter_name=adapter_name)


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint as accelerate writes it for FSDP2 with SHARDED_STATE_DICT, and the adapter's tensors."""
    model, checkpoint = adapted(), tmp_path / "checkpoint-3"
    expected = get_peft_model_state_dict(model)
    dcp.save({"model": expected}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0", no_dist=True)
    complete_sharded_checkpoint(checkpoint, model)
    return checkpoint, expected


def test_shards_become_the_adapter(shards: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    checkpoint, expected = shards
    result = CliRunner().invoke(build_app(), ["convert-checkpoint", str(checkpoint), "-o", str(tmp_path / "adapter")])
    assert result.exit_code == 0, result.output
    assert "from FSDP2's pieces" in result.output
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    tokens = torch.arange(8)[None]
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(tokens).logits, adapted().eval()(tokens).logits)


def test_a_card_around_the_checkpoint_is_not_the_adapters(
    shards: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    card = tmp_path / "README.md"
    for text in ("---\nA rule: with: colons\n---\n", "---\nlibrary_name: peft\n---\n\n# A LoRA\n"):
        card.write_text(text)
        complete_sharded_checkpoint(shards[0], adapted())
        convert_checkpoint(shards[0], tmp_path / f"adapter{len(text)}")
        assert card.read_text() == text


@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_tensors_of_a_model_get_the_names_that_peft_saves_them_by(adapter_name: str) -> None:
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    factors = {
        name: t for name, t in model.state_dict().items() if "sorsa_factors" in name or "modules_to_save" in name
    }
    found = adapter_tensors(factors, adapter_name, Path("somewhere"))
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_name_that_no_adapter_has_is_refused() -> None:
    with pytest.raises(ForeignAdapterError, match="no SORSA adapter named 'third'; it has: default"):
        adapter_tensors(adapted().state_dict(), "third", Path("somewhere"))


def test_a_directory_without_pieces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ForeignAdapterError, match="expected a checkpoint-N directory"):
        convert_checkpoint(tmp_path, tmp_path / "adapter")
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ForeignAdapterError, match="complete adapter already"):
        convert_checkpoint(tmp_path, tmp_path / "adapter")


def test_pieces_without_a_config_take_one_from_elsewhere(
    shards: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    checkpoint, _ = shards
    (tmp_path / "elsewhere").mkdir()
    (checkpoint / "adapter_config.json").rename(tmp_path / "elsewhere" / "adapter_config.json")
    with pytest.raises(ForeignAdapterError, match="with --config"):
        convert_checkpoint(checkpoint, tmp_path / "adapter")
    assert convert_checkpoint(checkpoint, tmp_path / "adapter", config=tmp_path / "elsewhere").layers == 4


def test_a_config_of_another_adapter_leaves_no_output(
    shards: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    checkpoint, _ = shards
    SORSAConfig(r=3, target_modules=["q_proj", "down_proj"]).save_pretrained(tmp_path / "other")
    with pytest.raises(IncompleteAdapterError):
        convert_checkpoint(checkpoint, tmp_path / "adapter", config=tmp_path / "other")
    assert not (tmp_path / "adapter").exists()


def test_an_occupied_output_is_refused(shards: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        convert_checkpoint(shards[0], tmp_path / "adapter")


def test_deepspeed_partitions_without_deepspeed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted().save_pretrained(tmp_path)
    (tmp_path / "latest").write_text("global_step3")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'sorsa-plugin\[deepspeed\]'"):
        convert_checkpoint(tmp_path, tmp_path / "adapter")


class Hostile:
    """A pickled call: reading it makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.made,))


def test_metadata_that_would_run_code_is_refused_before_it_does(
    shards: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path, made = shards[0] / "pytorch_model_fsdp_0" / ".metadata", tmp_path / "made"
    pickle.loads(pickle.dumps(Hostile(made)))
    assert made.exists(), "the pickle is harmless, so this test shows nothing"
    made.unlink()
    path.write_bytes(pickle.dumps(Hostile(made)))
    with pytest.raises(ForeignAdapterError, match=r"names \w+.*expected torch's own records of tensors"):
        convert_checkpoint(shards[0], tmp_path / "adapter")
    assert not made.exists()
    assert not (tmp_path / "adapter").exists()


def test_a_pickled_object_beside_the_tensors_is_refused_before_it_is_read(tmp_path: Path) -> None:
    checkpoint, made = tmp_path / "checkpoint-3", tmp_path / "made"
    state = {"model": {**get_peft_model_state_dict(adapted()), "extra": Hostile(made)}}
    dcp.save(state, checkpoint_id=checkpoint / "pytorch_model_fsdp_0", no_dist=True)
    adapted().peft_config["default"].save_pretrained(str(checkpoint))
    with pytest.raises(ForeignAdapterError, match=r"lists model.extra, which is stored as a pickled object"):
        convert_checkpoint(checkpoint, tmp_path / "adapter")
    assert not made.exists()


def test_damaged_metadata_is_a_sentence(shards: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    path = shards[0] / "pytorch_model_fsdp_0" / ".metadata"
    whole = path.read_bytes()
    for damaged in (b"", b"\x80", whole[: len(whole) // 2], whole[:-1], b"not a pickle"):
        path.write_bytes(damaged)
        with pytest.raises(IncompleteAdapterError, match="cannot be read"):
            convert_checkpoint(shards[0], tmp_path / "adapter")
