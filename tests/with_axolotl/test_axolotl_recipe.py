"""What of an Axolotl recipe SORSA honours and refuses, through Axolotl's own validation; nothing is trained here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl")

from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from builders.axolotl_runs import axolotl, base_model, recipe
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError

from sorsa_axolotl.checkpoints import choose_checkpoint, save_adapter_alone
from sorsa_axolotl.plugin import SORSAPlugin
from sorsa_axolotl.recipe import REFUSED
from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import AdapterOptionsError, ForeignAdapterError, IncompleteAdapterError

pytestmark = pytest.mark.axolotl


@pytest.fixture(autouse=True)
def _no_plugins_left_behind() -> Any:
    yield
    PluginManager.get_instance().plugins.clear()


def validated(**changes: Any) -> DictDefault:
    """What Axolotl makes of the recipe on a machine with a GPU, as far as it looks before loading anything."""
    cfg = DictDefault({"plugins": ["sorsa_axolotl.SORSAPlugin"], **recipe(plugins=None, output_dir="out", **changes)})
    prepare_plugins(cfg)
    capabilities = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
    return validate_config(cfg, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})


def refusal(**changes: Any) -> str:
    with pytest.raises(ValidationError) as error:
        validated(**changes)
    return str(error.value)


ASKING: dict[str, Any] = {
    "peft_use_dora": True,
    "peft_use_rslora": True,
    "peft_init_lora_weights": "pissa",
    "peft": {"loftq_config": {"loftq_bits": 4}},
    "peft_layer_replication": [[0, 2], [1, 3]],
    "lora_alpha_pattern": {"q_proj": 32},
    "lora_mlp_kernel": True,
    "lora_qkv_kernel": True,
    "lora_o_kernel": True,
    "lora_embedding_kernel": True,
    "loraplus_lr_ratio": 16,
    "relora": True,
    "qlora_sharded_model_loading": True,
    "gptq": True,
    "qat": {"weight_dtype": "int8"},
    "use_onebitllms": True,
    "flash_attn_fuse_mlp": True,
    "trl": {"vllm_lora_sync": True},
    "peft_autocast_adapter_dtype": False,
}


def test_every_refused_key_is_tried() -> None:
    assert {name.split(".")[0] for name in REFUSED} == ASKING.keys() - {"peft_autocast_adapter_dtype"}


@pytest.mark.parametrize("key", ASKING)
def test_a_key_that_sorsa_cannot_honour_is_refused_by_name_with_the_reason(key: str) -> None:
    message = refusal(**{key: ASKING[key]})
    dotted = next((name for name in REFUSED if name.split(".")[0] == key), key)
    assert "adapter: sorsa cannot honour this recipe" in message
    assert f"Delete the line {dotted}." in message
    if dotted in REFUSED:
        assert REFUSED[dotted] in message


def test_random_factors_are_refused_as_named_schemes_are() -> None:
    assert "peft_init_lora_weights is false: SORSA starts from" in refusal(peft_init_lora_weights=False)


def test_all_refused_lines_are_named_at_once() -> None:
    message = refusal(peft_use_dora=True, relora=True)
    assert "Delete the line peft_use_dora." in message
    assert "Delete the line relora." in message


def test_the_same_keys_mean_nothing_to_us_in_a_recipe_for_lora() -> None:
    cfg = validated(adapter="lora", peft_use_dora=True, loraplus_lr_ratio=16, sorsa={"gamma": 0.1})
    assert cfg.peft_use_dora
    assert SORSAPlugin().load_adapter(None, cfg) is None
    assert SORSAPlugin().add_callbacks_post_trainer(cfg, None) == []


def test_keys_that_are_off_or_lora_defaults_pass() -> None:
    validated(peft_use_dora=False, peft_init_lora_weights=True, lora_mlp_kernel=False, load_in_8bit=False)
    validated(load_in_4bit=True)
    validated(load_in_8bit=True, adapter="qsorsa")


@pytest.mark.parametrize("rl", ["dpo", "ipo", "kto"])
def test_preference_tuning_on_a_saved_adapter_is_refused_with_the_way_that_works(rl: str) -> None:
    cfg = {"adapter": "sorsa", "rl": rl, "lora_model_dir": "adapter"}
    training, merging = SORSAPlugin(), SORSAPlugin()
    training.register(cfg)
    with pytest.raises(AdapterOptionsError, match=f"starts rl: {rl} from a new adapter.*axolotl merge-lora"):
        training.pre_model_load(DictDefault(cfg))
    merging.register(cfg | {"merge_lora": True})
    merging.pre_model_load(DictDefault(cfg))


FURTHER = {
    "lora_target_parameters": ("target_parameters", ["experts.gate_up_proj"]),
    "peft_trainable_token_indices": ("trainable_token_indices", [1, 2]),
    "peft_ensure_weight_tying": ("ensure_weight_tying", True),
}


@pytest.mark.parametrize("key", FURTHER)
def test_what_goes_beyond_modules_reaches_the_config(key: str) -> None:
    field, value = FURTHER[key]
    _, config = SORSAPlugin().load_adapter(base_model(), validated(**{key: value}), config_only=True)
    assert getattr(config, field) == value


def test_inference_without_a_saved_adapter_is_refused() -> None:
    assert "Add --lora-model-dir=out" in refusal(inference=True)
    validated(inference=True, lora_model_dir="out")


def test_merging_goes_through_peft_and_the_method_for_lora_tensors_is_refused() -> None:
    assert validated(merge_lora=True).merge_method == "legacy"
    message = refusal(merge_lora=True, merge_method="memory_efficient")
    assert "Delete the line merge_method" in message
    assert "sorsa merge --base" in message
    assert "--adapter out -o merged" in message


def test_the_sorsa_blocks_learning_rate_is_the_one_that_is_trained_with() -> None:
    assert validated(learning_rate=2e-4, sorsa={"learning_rate": "3e-3"}).learning_rate == 3e-3
    assert validated(learning_rate=2e-4, adapter="lora", sorsa={"learning_rate": "3e-3"}).learning_rate == 2e-4


def test_options_outside_of_the_block_are_refused() -> None:
    assert "gamma belongs into the block: `sorsa: {gamma: ...}`." in refusal(gamma=0.1)
    assert "sorsa_r is read by nobody. Write lora_r." in refusal(sorsa_r=8)


def test_fsdp_1_is_refused_and_fsdp_2_is_not() -> None:
    sharding = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    assert "fsdp_version is 1: FSDP1 is not supported. Set fsdp_version: 2." in refusal(
        fsdp_config=sharding, fsdp_version=1
    )
    validated(fsdp_config=sharding, fsdp_version=2)


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        (
            {"gama": 1e-3},
            "'gama' is no option of the sorsa block; expected gamma, reg_update, reg_schedule, learning_rate, svd",
        ),
        ({"gama": 1e-3}, "Did you mean 'gamma'?"),
        ({"r": 8}, "Rank, targets and dropout are Axolotl's own keys: lora_r"),
        ({"gamma": -1}, "gamma is -1.0; expected a finite number >= 0"),
        ({"gamma": 1, "reg_update": "decoupled"}, "expected at most 0.5"),
        ({"reg_schedule": "lr"}, "the coupled update always follows the learning rate"),
        ({"gamma": True}, "gamma is true; no option of the sorsa block is a switch"),
        ({"svd": "fast"}, "Input should be 'auto', 'exact' or 'randomized'"),
    ],
)
def test_a_wrong_block_is_refused_before_anything_is_loaded(block: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(sorsa=block)


def test_wrong_values_of_axolotls_own_keys_are_refused_before_anything_is_loaded() -> None:
    assert "r is 0; expected an integer >= 1" in refusal(lora_r=0)
    assert "expected a probability in [0, 1)" in refusal(lora_dropout=1.5)
    message = refusal(lora_target_modules="q_proj|v_proj")
    assert "lora_target_linear is set and lora_target_modules is the expression" in message


def test_a_new_adapter_needs_a_rank_and_something_to_adapt() -> None:
    assert "lora_r is not set; expected" in refusal(lora_r=None)
    assert "The recipe names nothing to adapt. Add lora_target_linear: true" in refusal(lora_target_linear=None)
    validated(lora_r=None, lora_target_linear=None, lora_model_dir="out")


def test_parameters_alone_are_adapted_alone() -> None:
    cfg = validated(lora_target_linear=None, lora_target_parameters=["k_proj.weight"])
    _, config = SORSAPlugin().load_adapter(base_model(), cfg, config_only=True)
    adapted = get_peft_model(base_model(), config)
    layers = [name for name, _ in adapted.named_modules() if name.endswith(".sorsa_factors")]
    assert layers
    assert all(".k_proj." in name for name in layers)


def test_every_key_of_the_recipe_reaches_the_config() -> None:
    cfg = validated(
        lora_r=6,
        lora_dropout=0.25,
        lora_target_linear=None,
        lora_target_modules=["q_proj", "up_proj"],
        lora_exclude_modules=["layers.0.mlp.up_proj"],
        lora_modules_to_save=["embed_tokens", "lm_head"],
        lora_rank_pattern={"q_proj": 3},
        peft_layers_to_transform=[0, 2],
        peft_layers_pattern=["layers"],
        sorsa={"gamma": "2e-4", "reg_update": "decoupled", "reg_schedule": "constant", "svd": "exact", "svd_seed": 5},
    )
    model, config = SORSAPlugin().load_adapter(base_model(), cfg, config_only=True)
    assert model is None
    assert config.target_modules == {"q_proj", "up_proj"}
    assert config.exclude_modules == {"layers.0.mlp.up_proj"}
    assert config.modules_to_save == ["embed_tokens", "lm_head"]
    assert (config.r, config.rank_pattern) == (6, {"q_proj": 3})
    assert type(config.rank_pattern) is dict
    assert (config.layers_to_transform, config.layers_pattern) == ([0, 2], ["layers"])
    assert config.sorsa_dropout == 0.25
    assert (config.gamma, config.reg_update, config.reg_schedule) == (2e-4, "decoupled", "constant")
    assert (config.svd, config.svd_seed) == ("exact", 5)
    adapted = get_peft_model(base_model(), config)
    layers = {name.removesuffix(".base_layer") for name, _ in adapted.named_modules() if name.endswith(".base_layer")}
    assert {name.split("layers.")[1] for name in layers} == {
        "0.self_attn.q_proj",
        "2.self_attn.q_proj",
        "2.mlp.up_proj",
    }


def test_qsorsa_is_sorsa_on_residuals_with_the_same_block() -> None:
    cfg = validated(adapter="qsorsa", load_in_4bit=True, sorsa={"gamma": 1e-3, "full_precision_base": "elsewhere"})
    _, config = SORSAPlugin().load_adapter(base_model(), cfg, config_only=True)
    assert (config.residual_base, config.full_precision_base, config.gamma) == (True, "elsewhere", 1e-3)
    assert "adapter: qsorsa cannot honour this recipe" in refusal(adapter="qsorsa", peft_use_dora=True)
    assert "without residual_base=True, which alone reads it" in refusal(sorsa={"full_precision_base": "elsewhere"})


def test_lora_target_linear_joins_the_listed_modules_as_it_does_for_lora() -> None:
    cfg = validated(lora_target_modules=["embed_out"])
    _, config = SORSAPlugin().load_adapter(base_model(), cfg, config_only=True)
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert config.target_modules == {"embed_out", *linear}


def test_a_directory_without_a_sorsa_adapter_is_refused(tmp_path: Path) -> None:
    cfg = validated(lora_model_dir=str(tmp_path))
    with pytest.raises(ForeignAdapterError, match="holds no adapter_config"):
        SORSAPlugin().load_adapter(base_model(), cfg)


def test_the_base_model_object_saves_the_adapter_until_it_is_a_model_again(tmp_path: Path) -> None:
    _, config = SORSAPlugin().load_adapter(base_model(), validated(), config_only=True)
    base = base_model()
    adapted = get_peft_model(base, config)
    save_adapter_alone(adapted)
    base.save_pretrained(str(tmp_path / "adapter"))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    PeftModel.from_pretrained(base_model(), str(tmp_path / "adapter"))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(str(tmp_path / "model"))
    again = type(merged).from_pretrained(str(tmp_path / "model"))
    assert torch.equal(again.lm_head.weight, merged.lm_head.weight)


def test_resuming_from_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    cfg = DictDefault(output_dir=str(tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(IncompleteAdapterError, match="no complete checkpoint"):
        choose_checkpoint(cfg)
    cfg = DictDefault(output_dir=str(tmp_path), auto_resume_from_checkpoints=True)
    choose_checkpoint(cfg)
    assert cfg.resume_from_checkpoint is None
    assert not cfg.auto_resume_from_checkpoints  # else Axolotl takes checkpoint-3 after all


def saved_checkpoint(directory: Path, config: Any) -> str:
    """A checkpoint in which nothing is missing, as far as `is_complete` looks."""
    get_peft_model(base_model(), config).save_pretrained(str(directory))
    (directory / "trainer_state.json").write_text('{"global_step": 4}')
    return str(directory)


@pytest.mark.parametrize("named", [True, False])
def test_resuming_from_a_checkpoint_of_another_method_is_refused(named: bool, tmp_path: Path) -> None:
    checkpoint = saved_checkpoint(tmp_path / "checkpoint-4", LoraConfig(target_modules=["q_proj"]))
    how = {"resume_from_checkpoint": checkpoint} if named else {"auto_resume_from_checkpoints": True}
    with pytest.raises(ForeignAdapterError, match="says peft_type 'LORA'; expected 'SORSA'"):
        choose_checkpoint(DictDefault(output_dir=str(tmp_path), adapter="sorsa", **how))


def test_an_adapter_trains_on_under_the_word_that_it_was_made_with(tmp_path: Path) -> None:
    checkpoint = saved_checkpoint(tmp_path / "checkpoint-4", SORSAConfig(r=2, target_modules=["q_proj"]))
    choose_checkpoint(DictDefault(output_dir=str(tmp_path), adapter="sorsa", resume_from_checkpoint=checkpoint))
    with pytest.raises(ForeignAdapterError, match=r"made with adapter: sorsa.*the recipe says adapter: qsorsa"):
        choose_checkpoint(DictDefault(output_dir=str(tmp_path), adapter="qsorsa", resume_from_checkpoint=checkpoint))
    cfg = validated(adapter="qsorsa", load_in_4bit=True, lora_model_dir=checkpoint)
    with pytest.raises(ForeignAdapterError, match=r"made with adapter: sorsa.*the recipe says adapter: qsorsa"):
        SORSAPlugin().load_adapter(base_model(), cfg)


def test_a_continued_adapter_says_which_regularizer_and_origin_it_keeps(tmp_path: Path, caplog: Any) -> None:
    directory = saved_checkpoint(tmp_path, SORSAConfig(r=8, target_modules=["q_proj"], gamma=0.0))
    recipe = {"lora_target_linear": None, "lora_target_modules": ["q_proj"], "lora_model_dir": directory}
    _, config = SORSAPlugin().load_adapter(base_model(), validated(**recipe, sorsa={"svd_seed": 3}))
    assert config.gamma == 0.0
    assert "keeps the regularizer that it was saved with, gamma 0, coupled" in caplog.text
    assert "keeps what it was made with: svd_seed None, not 3." in caplog.text
    caplog.clear()
    _, config = SORSAPlugin().load_adapter(base_model(), validated(**recipe, sorsa={"gamma": 1e-3}))
    assert config.gamma == 1e-3
    assert "keeps" not in caplog.text


def test_a_broken_installation_stops_the_command_with_the_pip_command(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['sorsa_transformers'] = None\n")
    run = axolotl("preprocess", recipe(), tmp_path / "out", path=[tmp_path])
    assert run.returncode != 0
    assert "BrokenInstallationError" in run.log.strip().splitlines()[-1]
    assert "Run: pip install --upgrade 'sorsa-plugin[axolotl]'" in run.log.strip().splitlines()[-1]


def test_a_wrong_class_name_is_answered_with_the_right_one() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import sorsa_axolotl; sorsa_axolotl.SorsaPlugin"], capture_output=True, text=True
    )
    assert "Axolotl's plug-in is SORSAPlugin" in result.stderr
