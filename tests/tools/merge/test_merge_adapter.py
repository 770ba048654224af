"""Merging into files: what merge_and_unload gives, bit for bit, in the base's own layout, with bounded memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from builders.adapters import trained
from builders.llama import TOKENS, tied_llama, tiny_llama
from builders.models import tiny_gpt2, tiny_mixtral
from builders.references import ROUNDOFF
from builders.saved import INDEX, digests, stored
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from sorsa_plugin import SORSAConfig, merge_adapter
from sorsa_plugin.layers.layer import sorsa_layers

CASES = {
    "sharded": (tiny_llama, {}, "20KB"),
    "one-file": (tiny_llama, {"task_type": "CAUSAL_LM"}, "5GB"),
    "bfloat16-sharded": (lambda: tiny_llama(torch.bfloat16), {}, "20KB"),
    "bfloat16-tied": (lambda: tied_llama(torch.bfloat16), {}, "5GB"),
    "rank-pattern": (tiny_llama, {"target_modules": r".*(q_proj|up_proj)", "rank_pattern": {"q_proj": 5}}, "20KB"),
    "conv1d": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, "40KB"),
    "modules-to-save": (
        tiny_llama,
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "model.norm"]},
        "20KB",
    ),
    "bfloat16-modules-to-save": (
        lambda: tiny_llama(torch.bfloat16),
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        "5GB",
    ),
    "lm-head": (tiny_llama, {"target_modules": ["lm_head", "o_proj"]}, "20KB"),
    "fused-experts": (tiny_mixtral, {"target_modules": ["q_proj", "o_proj"]}, "20KB"),
}


PLAIN_TRANSFORMERS = """
import sys
sys.modules["sorsa_plugin"] = sys.modules["peft"] = None
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
root = Path(sys.argv[1])
tokens = torch.load(root / "tokens.pt")
for case in sorted(path for path in root.iterdir() if path.is_dir()):
    model, info = AutoModelForCausalLM.from_pretrained(case / "merged", output_loading_info=True)
    with torch.no_grad():
        found = {"logits": model.eval()(tokens).logits, "state": model.state_dict(), "info": info}
    torch.save(found, case / "found.pt")
"""


def layout(tensors: dict[str, torch.Tensor]) -> list[tuple]:
    return [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Every case merged, and what transformers makes of it in a process that has neither PEFT nor this package."""
    root = tmp_path_factory.mktemp("merged")
    torch.save(TOKENS, root / "tokens.pt")
    results = {}
    for name, (make, options, shard_size) in CASES.items():
        directory = root / name
        make().save_pretrained(directory / "base", max_shard_size=shard_size)
        model = trained(AutoModelForCausalLM.from_pretrained(directory / "base"), **options)
        model.save_pretrained(directory / "sorsa")
        before = digests(directory / "base")
        report = merge_adapter(directory / "base", directory / "sorsa", directory / "merged", safe=True)
        with torch.no_grad():
            change = {layer.name: layer.get_delta_weight("default").double() for layer in sorsa_layers(model)}
            model.get_base_model().set_experts_implementation("eager")  # the fused kernels know no float64
            results[name] = {
                "report": report,
                "directory": directory,
                "before": before,
                "adapted": model(TOKENS).logits,
                "changes": change,
                "reference": PeftModel.from_pretrained(
                    AutoModelForCausalLM.from_pretrained(directory / "base"), directory / "sorsa"
                )
                .merge_and_unload()
                .state_dict(),
                "adapted64": model.double()(TOKENS).logits,
            }
    subprocess.run([sys.executable, "-I", "-c", PLAIN_TRANSFORMERS, str(root)], check=True, timeout=300, cwd=root)
    for name, result in results.items():
        result.update(torch.load(root / name / "found.pt", weights_only=False))
    return results


# -- the same model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_the_one_of_merge_and_unload_bit_for_bit(merged, case):
    found, reference = merged[case]["state"], merged[case]["reference"]
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("case", CASES)
def test_a_merged_weight_is_the_exact_sum_rounded_once(merged, case):
    result = merged[case]
    before = AutoModelForCausalLM.from_pretrained(result["directory"] / "base").state_dict()
    names = [name for name in result["report"].merged if f"{name}.weight" not in result["report"].replaced]
    assert names
    for name in names:
        W, change = before[f"{name}.weight"], result["changes"][name]
        exact = W.double() + change
        # the change is rounded in fp32 when it is made (2 r + 6 terms, see test_merge) and when it is added
        fp32 = ROUNDOFF[torch.float32] * (2 * exact.abs() + W.double().abs() + change.abs())
        rounding = 0.0 if W.dtype == torch.float32 else ROUNDOFF[W.dtype] * exact.abs()
        assert ((result["state"][f"{name}.weight"].double() - exact).abs() <= rounding + fp32).all(), name
        assert not torch.equal(result["state"][f"{name}.weight"], W), name


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("bfloat16")])
def test_plain_transformers_gives_the_logits_of_the_adapted_model(merged, case):
    result = merged[case]
    # Both are fp32 evaluations of the same function, which differ in the order of sums and in one rounding of each
    # weight: either lies about as far from the float64 result, and 8 allows for the luck of a maximum over 1152.
    rounding = (result["adapted"] - result["adapted64"]).abs().max()
    assert (result["logits"] - result["adapted64"]).abs().max() <= 8 * rounding
    assert not result["info"]["missing_keys"]
    assert not result["info"]["unexpected_keys"]


@pytest.mark.parametrize("case", CASES)
def test_names_shards_dtypes_and_index_are_the_bases_and_other_tensors_its_bytes(merged, case):
    result = merged[case]
    directory = result["directory"]
    before, after = stored(directory / "base"), stored(directory / "merged")
    changed = {f"{name}.weight" for name in result["report"].merged} | set(result["report"].replaced)
    assert before.keys() == after.keys()
    assert (len(before) > 1) == (CASES[case][2] != "5GB")
    for shard, tensors in before.items():
        assert [(n, t.dtype, t.shape) for n, t in after[shard].items()] == [
            (n, t.dtype, t.shape) for n, t in tensors.items()
        ]
        with safe_open(directory / "base" / shard, "pt") as old, safe_open(directory / "merged" / shard, "pt") as new:
            assert new.metadata() == old.metadata()
        for name, tensor in tensors.items():
            assert torch.equal(after[shard][name], tensor) == (name not in changed), name
    now = digests(directory / "merged")
    for name in (INDEX, "config.json", "generation_config.json"):
        assert now.get(name) == result["before"].get(name)
    assert len(result["report"].merged) == len(result["changes"])


@pytest.mark.parametrize("case", CASES)
def test_the_base_directory_is_untouched(merged, case):
    assert digests(merged[case]["directory"] / "base") == merged[case]["before"]


def test_an_adapter_on_the_model_without_a_head_finds_its_layers_in_the_checkpoint_with_one(sharded_llama, tmp_path):
    """...and the other way round: transformers adds or drops the prefix `model.` while it loads."""
    model = trained(AutoModel.from_pretrained(sharded_llama), task_type="FEATURE_EXTRACTION", target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "sorsa")
    merge_adapter(sharded_llama, tmp_path / "sorsa", tmp_path / "merged")
    reference = model.merge_and_unload().state_dict()
    found = AutoModel.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in reference.items())

    tied_llama().model.save_pretrained(tmp_path / "headless")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "headless"), target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "sorsa2")
    merge_adapter(tmp_path / "headless", tmp_path / "sorsa2", tmp_path / "merged2")
    reference = model.merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged2").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in reference.items())


# -- files -----------------------------------------------------------------------------------------------------------


def test_all_other_files_are_copied_but_no_unmerged_weights_no_card_and_no_adapter(sharded_llama, adapter, tmp_path):
    shutil.copytree(sharded_llama, tmp_path / "base")
    copied = ["tokenizer.json", "chat_template.jinja", "modeling_own.py", "LICENSE", "1_Pooling/config.json"]
    copied += ["2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"]
    left = ["pytorch_model.bin", "consolidated.00.pth", "onnx/model.onnx", "model.fp16.safetensors", "model.gguf"]
    left += ["adapter_config.json", "adapter_model.safetensors"]  # transformers would load it on top of the merged one
    for name in (*copied, *left, ".git/HEAD"):
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text(name)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n\n# The base\n")
    report = merge_adapter(tmp_path / "base", adapter, tmp_path / "merged")
    names = set(digests(tmp_path / "merged"))
    assert names == set(digests(sharded_llama)) | {*copied, "README.md"}
    assert all((tmp_path / "merged" / name).read_text() == name for name in copied)
    assert sorted(report.left_out) == sorted(left)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "license: mit" in card
    assert "- sorsa" in card
    assert "The base" not in card


@pytest.mark.parametrize("card", [b"---\nA rule: with: colons\n---\n", b"---\nlicense: mit\n---\ncaf\xe9\n"])
def test_a_base_whose_card_cannot_be_read_is_merged_as_one_without(sharded_llama, adapter, card, tmp_path):
    shutil.copytree(sharded_llama, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_bytes(card)
    merge_adapter(tmp_path / "base", adapter, tmp_path / "merged")
    written = (tmp_path / "merged" / "README.md").read_text()
    assert "- sorsa" in written
    assert "license" not in written


MEMORY = """
import sys
import torch
from sorsa_plugin import merge_adapter

torch.set_num_threads(1)

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024

root = sys.argv[1]
for base in ("base", "sharded", "one-file"):  # the first for imports, thread pools, the empty model
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    merge_adapter(f"{root}/{base}", f"{root}/sorsa", f"{root}/merged-{base}")
    print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory of a process")
def test_merging_holds_neither_the_model_nor_two_shards(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=8))
    for name, shard_size in (("base", "5GB"), ("sharded", "15MB"), ("one-file", "5GB")):
        model.save_pretrained(tmp_path / name, max_shard_size=shard_size)
    config = SORSAConfig(r=2, target_modules="all-linear", init_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "sorsa")
    assert len(list((tmp_path / "sharded").glob("model-*"))) == 6
    assert (tmp_path / "one-file" / "model.safetensors").stat().st_size > 80e6
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=300, check=True
    )
    _, sharded, one_file = map(int, done.stdout.split()[-3:])
    # The largest weight takes 2 MB; as base, change, sum, rounded result and buffer about five of these are held.
    assert max(sharded, one_file) < 2 * 15e6
