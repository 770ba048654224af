"""LoraConfig's options in SORSAConfig: taken, renamed, said to be unused, or refused; none is written to a file."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import LoraOptionError, SORSAConfigError, SORSAError, UnknownOptionError

SCRIPT = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.125, "bias": "none", "target_modules": ["q_proj", "v_proj"]}


def test_a_lora_scripts_options_make_a_config_and_one_line_says_what_is_not_used(caplog):
    config = SORSAConfig(**SCRIPT, use_rslora=True, init_lora_weights="gaussian", alpha_pattern={"q_proj": 8})
    assert (config.r, config.sorsa_dropout, config.target_modules) == (4, 0.125, {"q_proj", "v_proj"})
    (record,) = caplog.records
    unused = "lora_alpha=32, alpha_pattern={'q_proj': 8}, use_rslora=True, init_lora_weights='gaussian'"
    assert record.getMessage().startswith(f"SORSAConfig does not use {unused}: S is trained")


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "none"},
        {"use_dora": False},
        {"layer_replication": None},
        {"lora_bias": False},
        {"lora_alpha": None},
        {"use_rslora": False, "init_lora_weights": True, "alpha_pattern": {}},
    ],
    ids=str,
)
def test_an_option_at_loras_default_asks_for_nothing_and_nothing_is_said(options, caplog):
    assert SORSAConfig(**options) == SORSAConfig()
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "all"}, "1 of LoraConfig's options. bias='all': SORSA trains no bias.* or set bias=\"none\""),
        ({"layer_replication": [[0, 1]]}, r"layer_replication=\[\[0, 1\]\]: SORSA does not repeat layers"),
        ({"use_dora": True, "lora_bias": True}, "2 of .* use_dora=True: it makes another LoRA. Delete it; lora_bias"),
        ({"megatron_config": {"a": 1}}, "megatron_config={'a': 1}: SORSA does not adapt Megatron's layers"),
        ({"lora_dropout": 0.1, "sorsa_dropout": 0.0}, "lora_dropout is 0.1 and sorsa_dropout is 0.0; they are one"),
        ({"lora_dropout": 1.5}, r"sorsa_dropout is 1.5; expected a probability"),
        ({"lora_dropout": None}, r"sorsa_dropout is None; expected .* lora_dropout is the same"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_honoured_is_a_sentence(options, message):
    with pytest.raises(SORSAConfigError, match=message):
        SORSAConfig(**options)
    loras = {name: value for name, value in options.items() if name != "sorsa_dropout"}
    if "layer_replication" in options:
        with pytest.raises(LoraOptionError, match=message):
            SORSAConfig.from_lora(LoraConfig(**loras))


@pytest.mark.parametrize(
    ("word", "meant"),
    [("gama", "gamma"), ("sorsa_r", "r"), ("sorsa_gamma", "gamma"), ("target_module", "target_modules"),
     ("lora_dropuot", "lora_dropout")],
)  # fmt: skip
def test_an_unknown_option_is_a_sentence_with_the_nearest_word(word, meant):
    with pytest.raises(UnknownOptionError, match=rf"argument '{word}'; expected some of .*Did you mean '{meant}'\?"):
        SORSAConfig(**{word: 1})


def test_names_of_methods_are_no_options():
    with pytest.raises(UnknownOptionError, match="'to_dict'"):
        SORSAConfig(to_dict=1)


def test_pefts_reader_still_drops_an_option_of_a_newer_file_with_its_warning(tmp_path):
    SORSAConfig(r=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_the_future": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['of_the_future'\] for class SORSAConfig"):
        assert PeftConfig.from_pretrained(tmp_path).r == 3


def test_loras_options_are_no_fields_and_pass_every_round_trip_as_ours(tmp_path, caplog):
    config = SORSAConfig(**SCRIPT)
    caplog.clear()
    assert config.to_dict().keys() == {field.name for field in dataclasses.fields(SORSAConfig)}
    assert not {"lora_alpha", "lora_dropout", "bias"} & inspect.signature(SORSAConfig).parameters.keys()
    assert {"r", "sorsa_dropout", "gamma"} <= inspect.signature(SORSAConfig).parameters.keys()
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.keys() == config.to_dict().keys()
    twins = [
        PeftConfig.from_pretrained(tmp_path),
        SORSAConfig.from_peft_type(**config.to_dict()),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config),
        SORSAConfig(**config.to_dict()),
    ]
    assert all(twin == config for twin in twins)
    assert not caplog.records, "a copy has nothing left to say"


def test_from_lora_takes_what_means_the_same_and_leaves_the_lora_config_alone(caplog):
    shared = {
        "r": 5,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["lm_head"],
        "rank_pattern": {"q_proj": 3},
        "modules_to_save": ["score"],
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "task_type": "SEQ_CLS",
        "fan_in_fan_out": True,
        "target_parameters": ["mlp.experts.down_proj"],
        "trainable_token_indices": [1, 2],
        "ensure_weight_tying": True,
        "revision": "main",
        "base_model_name_or_path": "somewhere",
    }
    lora = LoraConfig(**shared, lora_dropout=0.25, lora_alpha=64, inference_mode=True)
    before = copy.deepcopy(lora.to_dict())
    config = SORSAConfig.from_lora(lora)
    assert config == SORSAConfig(**shared, sorsa_dropout=0.25)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "SORSAConfig does not use lora_alpha=64"
    ]
    config.rank_pattern["q_proj"] = 9
    config.target_modules.clear()
    assert lora.to_dict() == before


def test_every_option_that_both_configs_have_is_taken_from_lora():
    """A new option of PEFT's that SORSA gets too is taken without a change here."""
    loras, ours = ({item.name for item in dataclasses.fields(kind)} for kind in (LoraConfig, SORSAConfig))
    not_taken = {"peft_type", "peft_version", "auto_mapping", "inference_mode"}
    tried = {"r", "target_modules", "exclude_modules", "rank_pattern", "modules_to_save", "layers_to_transform",
             "layers_pattern", "task_type", "fan_in_fan_out", "target_parameters", "trainable_token_indices",
             "ensure_weight_tying", "revision", "base_model_name_or_path"}  # fmt: skip
    assert (loras & ours) - not_taken == tried


def test_overrides_of_from_lora_win_and_are_checked():
    lora = LoraConfig(r=16, lora_dropout=0.25)
    config = SORSAConfig.from_lora(lora, r=2, gamma=0.5, sorsa_dropout=0.0)
    assert (config.r, config.gamma, config.sorsa_dropout) == (2, 0.5, 0.0)
    assert SORSAConfig.from_lora(lora, lora_dropout=0.125).sorsa_dropout == 0.125
    with pytest.raises(UnknownOptionError, match="Did you mean 'gamma'"):
        SORSAConfig.from_lora(lora, gama=1)


@pytest.mark.parametrize(
    "other",
    [IA3Config(), AdaLoraConfig(total_step=20, tinit=1, tfinal=1), {"r": 8}],
    ids=lambda value: type(value).__name__,
)
def test_from_lora_takes_lora_alone(other):
    with pytest.raises(SORSAConfigError, match=f"from_lora got {type(other).__name__}; expected peft.LoraConfig"):
        SORSAConfig.from_lora(other)


@pytest.mark.parametrize("error", [LoraOptionError, UnknownOptionError])
def test_these_errors_are_type_errors_as_for_any_call_and_ours(error):
    assert issubclass(error, TypeError)
    assert issubclass(error, SORSAError)


def test_layers_of_a_users_own_are_refused():
    """They say how a LoRA adapts a class of modules: without them the config would adapt other modules, or none."""
    lora = LoraConfig(r=4, target_modules=["0"])
    lora._register_custom_module({torch.nn.LSTM: torch.nn.Identity})
    with pytest.raises(LoraOptionError, match="layers of your own for LSTM; SORSA cannot train them"):
        SORSAConfig.from_lora(lora)
