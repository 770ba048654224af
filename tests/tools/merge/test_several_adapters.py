"""Several adapters merged at once: W plus the sum of their changes, each checked against W."""

from __future__ import annotations

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tied_llama, tiny_llama
from builders.models import tiny_mixtral
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sorsa_cli.app import build_app
from sorsa_plugin import SORSAConfig, export_lora, merge_adapter
from sorsa_plugin.errors import BaseMismatchError, MergeError

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
TIED = {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True}
WHOLE = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
PAIRS = {
    "dense": (tiny_llama, {"target_modules": "all-linear"}, {"target_modules": ["q_proj", "lm_head"], "r": 3}),
    "bfloat16": (lambda: tiny_llama(torch.bfloat16), {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]}),
    "experts": (tiny_mixtral, EXPERTS, EXPERTS),
    "experts-and-attention": (tiny_mixtral, EXPERTS, {"target_modules": ["q_proj", "v_proj"]}),
    "tied": (tied_llama, TIED, {"target_modules": ["v_proj"]}),
    "in-whole": (tiny_llama, WHOLE, {"target_modules": ["q_proj"]}),
}


def saved(base, directory, seed: int = 3, **options):
    model = get_peft_model(base, SORSAConfig(**{"r": 2, "task_type": "CAUSAL_LM", "svd_seed": seed, **options}))
    perturb(model, seed=seed, scale=0.3)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name and parameter.requires_grad:
            parameter.data.mul_(1 + seed / 10)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.filterwarnings("ignore:(Model has|Model with|Setting|Input and output|You have|Already|The following)")
def test_the_merged_model_is_the_one_of_merge_and_unload_bit_for_bit(case, tmp_path):
    make, one, other = PAIRS[case]
    make().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    first, second = saved(make(), tmp_path / "first", **one), saved(make(), tmp_path / "second", seed=4, **other)
    report = merge_adapter(tmp_path / "base", [first, second], tmp_path / "merged", safe=True)
    adapted = PeftModel.from_pretrained(make(), first)
    adapted.load_adapter(second, "second")
    if case != "in-whole":
        adapted.base_model.set_adapter(["default", "second"])
    expected = adapted.merge_and_unload(adapter_names=["default", "second"]).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    before = make().state_dict()
    assert {name.removesuffix(".weight") for name in found if not torch.equal(found[name], before[name])} >= {
        name for name in report.merged if ".experts." not in name
    }


def test_the_change_is_the_sum_of_both_changes(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    directories = [saved(tiny_llama(), tmp_path / f"{seed}", seed, target_modules=["q_proj"]) for seed in (3, 4)]
    merge_adapter(tmp_path / "base", directories, tmp_path / "both")
    for number, directory in enumerate(directories):
        merge_adapter(tmp_path / "base", directory, tmp_path / f"alone-{number}")
    name = "model.layers.1.self_attn.q_proj.weight"
    both, *alone = (
        AutoModelForCausalLM.from_pretrained(tmp_path / part).state_dict()[name].double() - base.state_dict()[name]
        for part in ("both", "alone-0", "alone-1")
    )
    assert all(change.norm() > 0.1 for change in alone)
    torch.testing.assert_close(both, sum(alone), rtol=0, atol=4 * 2**-24)  # weights below 1, rounded once each


def test_an_adapter_of_another_base_is_refused_whichever_it_is(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    own = saved(tiny_llama(), tmp_path / "own", target_modules=["q_proj"])
    foreign = saved(tiny_llama(seed=9), tmp_path / "foreign", target_modules=["q_proj"])
    for pair in ([own, foreign], [foreign, own]):
        with pytest.raises(BaseMismatchError):
            merge_adapter(tmp_path / "base", pair, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


@pytest.mark.filterwarnings("ignore:(Setting|Already|You have)")
def test_two_that_give_one_parameter_a_value_in_whole_are_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    first = saved(tiny_llama(), tmp_path / "first", **WHOLE)
    second = saved(tiny_llama(), tmp_path / "second", seed=4, **WHOLE)
    changing = saved(tiny_llama(), tmp_path / "changing", target_modules=["q_proj", "lm_head"])
    rows = saved(tiny_llama(), tmp_path / "rows", target_modules=["q_proj"], trainable_token_indices={"lm_head": [2]})
    for pair in ([first, second], [rows, first], [rows, rows]):
        with pytest.raises(MergeError, match=r"give lm_head\.weight a value.*Merge only one of them"):
            merge_adapter(tmp_path / "base", pair, tmp_path / "merged")
    for pair in ([first, changing], [changing, first]):
        with pytest.raises(MergeError, match="cannot be put on one model together: "):
            merge_adapter(tmp_path / "base", pair, tmp_path / "merged")
    with pytest.raises(MergeError, match="list of adapters is empty"):
        merge_adapter(tmp_path / "base", [], tmp_path / "merged")


def test_the_command_takes_the_option_twice_and_the_card_names_both(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    first = saved(tiny_llama(), tmp_path / "first", target_modules=["q_proj"])
    second = saved(tiny_llama(), tmp_path / "second", r=5, target_modules=["v_proj"])
    words = ["--base", str(tmp_path / "base"), "--adapter", str(first), "--adapter", str(second)]
    run = CliRunner().invoke(build_app(), ["merge", *words, "-o", str(tmp_path / "merged")])
    assert run.exit_code == 0, run.output
    assert "Merged 4 layers" in run.output
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "with a SORSA adapter of rank 2, and a SORSA adapter of rank 5 (" in " ".join(card.split())


@torch.no_grad()
def test_a_second_adapter_on_a_merged_base_is_refused_with_ways_that_work(tmp_path, tokens):
    directories = [saved(tiny_llama(), tmp_path / f"{seed}", seed, target_modules=["q_proj"]) for seed in (3, 4)]
    merged = PeftModel.from_pretrained(tiny_llama(), directories[0]).merge_and_unload()
    with pytest.raises(BaseMismatchError, match=r"merge_and_unload\(adapter_names=\[\.\.\.\]\).*sorsa export-lora"):
        PeftModel.from_pretrained(merged, directories[1])
    both = PeftModel.from_pretrained(tiny_llama(), directories[0])
    both.load_adapter(directories[1], "second")
    expected = both.merge_and_unload(adapter_names=["default", "second"])(tokens).logits
    export_lora(directories[1], tmp_path / "lora")
    once = PeftModel.from_pretrained(tiny_llama(), directories[0]).merge_and_unload()
    twice = PeftModel.from_pretrained(once, tmp_path / "lora").merge_and_unload()
    torch.testing.assert_close(twice(tokens).logits, expected, rtol=0, atol=1e-5)
