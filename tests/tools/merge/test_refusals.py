"""A merge that is killed or cannot be right leaves nothing, and says why by name."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from builders.adapters import trained
from builders.forks import exit_code_of_program
from builders.llama import tiny_llama
from builders.models import tiny_mixtral
from builders.saved import (
    CONFIG,
    FILE,
    INDEX,
    damaged,
    digests,
    scaled,
    without,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
)

from sorsa_plugin import SORSAError, merge_adapter
from sorsa_plugin.errors import (
    BaseFilesError,
    BaseMismatchError,
    ForeignAdapterError,
    IncompleteAdapterError,
    OutputExistsError,
)
from sorsa_plugin.layers.layer import sorsa_layers

# -- whole or not at all ---------------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
import sorsa_plugin.files.checkpoint_copy as checkpoint_copy
import sorsa_plugin.tools.merge.merge_adapter as merging
import sorsa_plugin.files.atomic_directory as outputs
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def halfway(writer, *args, _calls=[]):
    _calls.append(1)
    if len(_calls) == 6:
        writer.write(bytes(1000))
        writer.flush()
        die()
    write(writer, *args)
write = checkpoint_copy._write_tensor
{patch}
merging.merge_adapter(*sys.argv[1:])
"""

MOMENTS = {
    "while-writing-tensors": "checkpoint_copy._write_tensor = halfway",
    "before-the-config": "merging.copy_config = die",
    "before-it-takes-its-name": "outputs.os.replace = die",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_merge_leaves_nothing_that_looks_like_a_model_and_can_be_repeated(
    sharded_llama, adapter, tmp_path, moment
):
    output, before = tmp_path / "merged", digests(sharded_llama)
    program = KILLED.format(patch=MOMENTS[moment])
    assert exit_code_of_program(program, sharded_llama, adapter, output) == -signal.SIGKILL
    assert not output.exists()
    left = list(tmp_path.iterdir())
    assert [path.name.startswith(".merged.") and path.name.endswith(".partial") for path in left] == [True]
    assert list(left[0].glob("*.safetensors")), "it was killed before it wrote anything"
    if moment != "before-it-takes-its-name":  # then it is complete
        assert not (left[0] / "config.json").exists()
    assert digests(sharded_llama) == before
    assert len(merge_adapter(sharded_llama, adapter, output).merged) == 14


def test_an_output_that_is_in_use_is_refused_and_left_alone(sharded_llama, adapter, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for output in (tmp_path, sharded_llama, adapter):
        before = digests(output)
        with pytest.raises(OutputExistsError, match="is not empty; expected a new or empty directory"):
            merge_adapter(sharded_llama, adapter, output)
        assert digests(output) == before


# -- what does not fit -----------------------------------------------------------------------------------------------


def refused(error: type[SORSAError], message: str, base: Path, adapter: Path, tmp_path: Path, **options) -> None:
    """The merge raises, and leaves nothing behind."""
    before = set(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        merge_adapter(base, adapter, tmp_path / "merged", **options)
    assert set(tmp_path.iterdir()) == before


DAMAGES = {
    "without-a-part": (without(r"layers\.1\.mlp\.up_proj.*dV"), IncompleteAdapterError, r"lacks dV of .*up_proj"),
    "without-a-layer": (
        without(r"layers\.1\.mlp\.up_proj"),
        IncompleteAdapterError,
        r"by kind: \{'linear': 13\}; the adapter was saved with \{'linear': 14\}",
    ),
    "another-method": (
        lambda tensors: {name.replace("sorsa_factors.", "lora_A."): t for name, t in tensors.items()},
        ForeignAdapterError,
        r"factors of 0 SORSA layers",
    ),
    "nan": (
        scaled("1.mlp.up_proj.sorsa_factors.dU", float("nan")),
        IncompleteAdapterError,
        r"factors of model\.layers\.1\.mlp\.up_proj hold NaN",
    ),
    "another-base": (
        scaled("1.mlp.up_proj.sorsa_factors.fingerprint", 1.01),
        BaseMismatchError,
        r"fingerprint of model\.layers\.1\.mlp\.up_proj differs",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_foreign_adapter_is_refused_by_name(sharded_llama, adapter, tmp_path, change, error, message):
    refused(error, message, sharded_llama, damaged(adapter, tmp_path / "sorsa", change), tmp_path)


def test_a_lora_and_a_truncated_file_are_refused(sharded_llama, adapter, tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    refused(ForeignAdapterError, "peft_type 'LORA'; expected 'SORSA'", sharded_llama, tmp_path / "lora", tmp_path)
    shutil.copytree(adapter, tmp_path / "half")
    (tmp_path / "half" / FILE).write_bytes((adapter / FILE).read_bytes()[:9000])
    refused(IncompleteAdapterError, "cannot be read", sharded_llama, tmp_path / "half", tmp_path)
    refused(ForeignAdapterError, f"holds no {CONFIG}", sharded_llama, sharded_llama, tmp_path)


def test_another_base_model_is_refused_by_layer(adapter, tmp_path):
    tiny_llama(seed=9).save_pretrained(tmp_path / "base")
    refused(BaseMismatchError, r"fingerprint of model\.layers\.0\.\S+ differs", tmp_path / "base", adapter, tmp_path)
    tiny_llama(intermediate=40).save_pretrained(tmp_path / "narrow")
    refused(IncompleteAdapterError, r"\(48, 3\).*expected \(40, 3\)", tmp_path / "narrow", adapter, tmp_path)
    tiny_llama(layers=1).save_pretrained(tmp_path / "shallow")
    refused(BaseFilesError, r"factors of model\.layers\.1\.\S+, a module that the model in .* does not have",
            tmp_path / "shallow", adapter, tmp_path)  # fmt: skip


def test_a_resized_vocabulary_is_refused(sharded_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sharded_llama)
    model.resize_token_embeddings(70)
    trained(model, target_modules=["q_proj"], modules_to_save=["lm_head"]).save_pretrained(tmp_path / "sorsa")
    refused(BaseFilesError, r"shape \(64, 32\) in the base model; the adapter needs \(70, 32\)", sharded_llama,
            tmp_path / "sorsa", tmp_path)  # fmt: skip


def test_experts_that_cannot_be_taken_apart_again_are_refused_with_the_way_that_works(tmp_path):
    tiny_mixtral().save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "experts.1.w1" in name)
    save_file({**tensors, name: tensors[name].bfloat16()}, path, {"format": "pt"})  # one of them in another dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    options = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    trained(model, **options).save_pretrained(tmp_path / "sorsa")
    refused(BaseFilesError, r"cannot take it apart into these again.*merge_and_unload\(\)\.save_pretrained",
            tmp_path / "base", tmp_path / "sorsa", tmp_path)  # fmt: skip


def test_a_file_that_holds_more_or_less_than_its_config_says_is_refused(sharded_llama, tmp_path):
    tiny_mixtral().save_pretrained(tmp_path / "experts")
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    trained(tiny_mixtral(), target_modules=[], target_parameters=both).save_pretrained(tmp_path / "more")
    config = json.loads((tmp_path / "more" / CONFIG).read_text())
    (tmp_path / "more" / CONFIG).write_text(json.dumps({**config, "target_parameters": both[1:]}))
    refused(IncompleteAdapterError, r"factors of \S+experts\.base_layer, which its \S+ does not select",
            tmp_path / "experts", tmp_path / "more", tmp_path)  # fmt: skip
    trained(tiny_llama(), target_modules=["q_proj"], trainable_token_indices=[3]).save_pretrained(tmp_path / "less")
    less = damaged(tmp_path / "less", tmp_path / "no-rows", without("trainable_tokens_delta"))
    refused(IncompleteAdapterError, "has no .*trainable_tokens_delta, which trainable_token_indices", sharded_llama,
            less, tmp_path)  # fmt: skip


def edited(**changes):
    def edit(base: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def truncate_a_shard(base: Path) -> None:
    path = sorted(base.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])


def drop_a_tensor(base: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    path = base / json.loads((base / INDEX).read_text())["weight_map"][name]
    save_file({key: t for key, t in load_file(path).items() if key != name}, path, metadata={"format": "pt"})


def only_pickles(base: Path) -> None:
    for path in base.glob("model*"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"")


BASES = {
    "pickled": (only_pickles, r"holds pytorch_model\.bin; expected model\.safetensors"),
    "truncated-shard": (truncate_a_shard, r"model-00002-of-\d+\.safetensors cannot be read"),
    "absent-shard": (
        lambda base: sorted(base.glob("model-*"))[2].unlink(),
        r"lacks model-00003-of-\d+\.safetensors",
    ),
    "absent-tensor": (drop_a_tensor, r"No tensor in .* becomes model\.layers\.1\.mlp\.up_proj\.weight"),
    "no-config": (lambda base: (base / "config.json").unlink(), r"gives no model config"),
    "quantised": (edited(quantization_config={"quant_method": "fp8"}), r"stored quantised"),
    "unknown-architecture": (edited(model_type="nobodys"), r"gives no model config"),
}


@pytest.mark.parametrize(("damage", "message"), BASES.values(), ids=BASES)
def test_a_base_that_cannot_be_merged_in_files_is_refused(sharded_llama, adapter, tmp_path, damage, message):
    shutil.copytree(sharded_llama, tmp_path / "base")
    damage(tmp_path / "base")
    refused(BaseFilesError, message, tmp_path / "base", adapter, tmp_path)


def test_a_base_that_is_neither_here_nor_on_the_hub_is_refused(adapter, tmp_path):
    for name in ("nobody/nothing", str(tmp_path / "absent")):
        refused(
            BaseFilesError, rf"{name} is no directory here, and its weights cannot be fetched", name, adapter, tmp_path
        )


def test_safe_refuses_a_weight_that_leaves_the_range_of_its_dtype(tmp_path):
    tiny_llama(torch.float16).save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), target_modules=["q_proj"])
    with torch.no_grad():
        sorsa_layers(model)[1].factors("default").dS.fill_(1e7)  # finite, and beyond fp16's 65504 in the sum
    model.save_pretrained(tmp_path / "sorsa")
    message = r"layers\.1\.self_attn\.q_proj\.weight would hold NaN or infinity .* torch\.float16"
    refused(IncompleteAdapterError, message, tmp_path / "base", tmp_path / "sorsa", tmp_path, safe=True)
    merge_adapter(tmp_path / "base", tmp_path / "sorsa", tmp_path / "merged")
