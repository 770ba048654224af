"""Targets on models of experts: what PEFT makes of them for LoRA they are here, for every architecture it rewrites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from builders.adapters import assert_same_tensors, perturb
from builders.llama import TOKENS, tiny_llama
from builders.models import tiny_deepseek, tiny_mixtral, tiny_qwen3_moe
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import transformers_weight_conversion
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, Qwen3MoeConfig

from sorsa_plugin import SORSAConfig, export_lora
from sorsa_plugin.errors import RankError
from sorsa_plugin.layers.layer import sorsa_layers

TABLE = transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN
REWRITTEN = [
    model_type
    for model_type, family in TABLE.items()
    if family in transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING
    and model_type in CONFIG_MAPPING
    and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING
]
"""The architectures whose LoRA targets PEFT rewrites, as far as they are causal language models."""

CANNOT_BE_MADE = ("dots1", "hunyuan_v1_moe")
"""Model types whose config's defaults make no model."""


def on_meta(model_type: str) -> Any:
    """A model of full width and of few blocks, without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](num_hidden_layers=4))


def adapted_by_lora(model: Any) -> dict[str, int]:
    """{adapted module or parameter: rank} of a LoRA."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and (module.lora_A or module.lora_embedding_A):
            parameter = getattr(module, "parameter_name", None)
            own = name.replace(".base_layer", "")
            found[f"{own}.{parameter}" if parameter else own] = module.r["default"]
    return found


def adapted_by_sorsa(model: Any) -> dict[str, tuple[int, int]]:
    """{adapted module or parameter: its rank, and the most it can be}."""
    return {
        layer.name: (layer.factors("default").rank, min(layer.out_features, layer.in_features))
        for layer in sorsa_layers(model)
    }


OLD_NAMES = {"mixtral": ("w1", "w2", "w3"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


def same_as_lora(model_type: str, wanted: Any) -> None:
    theirs = adapted_by_lora(get_peft_model(on_meta(model_type), LoraConfig(r=4, target_modules=wanted)))
    ours = adapted_by_sorsa(get_peft_model(on_meta(model_type), SORSAConfig(r=4, target_modules=wanted)))
    narrowed = {name: min(rank, ours[name][1]) for name, rank in theirs.items()}
    assert {name: rank for name, (rank, _) in ours.items()} == narrowed
    assert any("experts" in name for name in ours)


NEW_ROUTERS = Version(transformers.__version__) >= Version("5.16")
"""Older ones read their bias through the adapted module, which PEFT's LoRA has not there."""


@pytest.mark.parametrize("model_type", [name for name in REWRITTEN if name not in CANNOT_BE_MADE])
def test_all_linear_adapts_the_same_weights_as_for_lora_at_the_same_rank(model_type):
    same_as_lora(model_type, "all-linear")


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")  # PEFT looks among modules alone
@pytest.mark.parametrize("model_type", OLD_NAMES)
@pytest.mark.parametrize("form", ["expression", "list", "by-parent"])
def test_names_of_experts_in_every_form_adapt_the_same_weights_as_for_lora(model_type, form):
    names = OLD_NAMES[model_type]
    forms = {
        "expression": rf".*\.({'|'.join(names)})",
        "list": [*names, "gate", "q_proj"],
        "by-parent": [f"experts.{name}" for name in names],
    }
    same_as_lora(model_type, forms[form])


def tiny(**changes: Any) -> Any:
    """The smallest Qwen3-MoE: one block of eight experts."""
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Qwen3MoeConfig(**sizes, num_key_value_heads=2, head_dim=8, num_experts=8, vocab_size=64, **changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_the_numbers_that_train_are_loras_and_one_for_each_triplet():
    def trained(config: Any) -> int:
        return get_peft_model(tiny(), config).get_nb_trainable_parameters()[0]

    # attention: q, o (32 x 32), k, v (16 x 32); router (8 x 32); each expert: (32 x 32) of two projections, (32 x 16)
    attention, router = 4 * (64 + 64 + 48 + 48), 4 * 40
    experts = 8 * (8 * 64 + 4 * 48)
    assert trained(LoraConfig(r=4, target_modules="all-linear")) == attention + router + experts
    triplets = 4 * 4 + 4 + 8 * (8 + 4)
    assert trained(SORSAConfig(r=4, target_modules="all-linear")) == attention + router + experts + triplets


def test_one_line_says_what_the_targets_mean_and_which_dense_layers_they_leave_out(caplog):
    get_peft_model(tiny_deepseek(), SORSAConfig(r=2, target_modules="all-linear"))
    [line] = [record.getMessage() for record in caplog.records if "Experts are stacks" in record.getMessage()]
    assert "the parameters down_proj, gate.weight, gate_up_proj in every layer. Not adapted: 6 modules" in line
    assert "such as model.layers.0.mlp.gate_proj" in line
    caplog.clear()
    get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules="all-linear"))
    get_peft_model(tiny_qwen3_moe(), SORSAConfig(r=2, target_modules=["q_proj"]))
    get_peft_model(tiny_qwen3_moe(), SORSAConfig(r=2, target_modules=r".*\.q_proj"))
    assert not caplog.records


def test_an_expression_that_selects_no_expert_keeps_its_meaning_and_says_what_loras_is(caplog):
    model = get_peft_model(tiny_qwen3_moe(), SORSAConfig(r=2, target_modules=r".*layers\.1\..*q_proj"))
    assert [layer.name for layer in sorsa_layers(model)] == ["model.layers.1.self_attn.q_proj"]
    assert "selects 1 modules. For LoRA PEFT would adapt all 2 whose names end alike." in caplog.text


def test_one_of_two_projections_that_are_now_one_is_refused_as_for_lora():
    with pytest.raises(ValueError, match="without also targeting up_proj because they are fused into gate_up_proj"):
        get_peft_model(tiny_qwen3_moe(), SORSAConfig(r=2, target_modules=["gate_proj"]))


def test_stacks_of_two_projections_narrow_too_and_ranks_of_their_own_hold(tmp_path):
    wanted = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    model = get_peft_model(tiny(), SORSAConfig(r=24, **wanted))  # of 32 x 32 and 32 x 16
    assert [layer.factors("default").rank for layer in sorsa_layers(model)] == [16, 32]
    own = get_peft_model(tiny(), SORSAConfig(r=2, rank_pattern={"gate_up_proj": 5}, **wanted))
    assert [layer.factors("default").rank for layer in sorsa_layers(own)] == [2, 5]
    with pytest.raises(RankError, match="gate_up_proj"):
        get_peft_model(tiny(), SORSAConfig(r=2, rank_pattern={"gate_up_proj": 33}, **wanted))


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")
@pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen3_moe, tiny_deepseek])
@torch.no_grad()
def test_adapters_of_experts_are_saved_loaded_exported_and_joined_by_a_second(make, tmp_path):
    model = get_peft_model(make(), SORSAConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    before = make()(TOKENS).logits
    assert torch.equal(model(TOKENS).logits, before)
    perturb(model, scale=0.3)
    model.save_pretrained(tmp_path / "sorsa")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "sorsa").eval()
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    expected = model(TOKENS).logits
    assert (expected - before).abs().max() > 1e-2
    export_lora(tmp_path / "sorsa", tmp_path / "lora")
    if make is not tiny_deepseek or NEW_ROUTERS:
        exported = PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
        torch.testing.assert_close(exported(TOKENS).logits, expected, rtol=0, atol=1e-5)
    second = SORSAConfig(r=2, target_modules="all-linear", svd_seed=1)
    loaded.add_adapter("second", second)
    assert second.target_modules == model.peft_config["default"].target_modules
    assert second.rank_pattern == model.peft_config["default"].rank_pattern


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")
def test_targets_of_a_saved_adapter_keep_the_meaning_that_they_had(tmp_path):
    """Earlier versions adapted the dense layers of these names, and not the experts."""
    names = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"]
    made = SORSAConfig(r=2, target_modules=[], target_parameters=[f"{name}.weight" for name in names])
    model = get_peft_model(tiny_deepseek(), made)
    perturb(model)
    made.target_modules, made.target_parameters = {"mlp.gate_proj", "mlp.down_proj"}, None
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_deepseek(), tmp_path)
    assert sorted(layer.name for layer in sorsa_layers(loaded)) == sorted(names)
