"""SORSAConfig: what it refuses, what it fills in, and that it survives JSON, copies and pickles."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import subprocess
import sys

import pytest
from builders.llama import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, get_peft_config, get_peft_model

from sorsa_plugin import SORSAConfig, SORSAError
from sorsa_plugin.config import DEFAULT_GAMMA
from sorsa_plugin.errors import SORSAConfigError
from sorsa_plugin.layers.layer import sorsa_layers

REFUSED = [
    ({"r": 0}, "r is 0; expected an integer >= 1"),
    ({"r": -3}, "r is -3; expected an integer >= 1"),
    ({"r": True}, "r is True; expected an integer"),
    ({"r": 8.0}, "r is 8.0; expected an integer"),
    ({"r": "8"}, "r is '8'; expected an integer"),
    ({"r": None}, "r is None; expected an integer"),
    ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0; expected an integer >= 1"),
    ({"rank_pattern": {"q_proj": "4"}}, r"rank_pattern\['q_proj'\] is '4'"),
    ({"rank_pattern": {"q_proj": True}}, r"rank_pattern\['q_proj'\] is True"),
    ({"target_modules": "q_proj", "layers_to_transform": 1}, "`layers_to_transform` cannot be used .* is a str"),
    ({"target_modules": "q_proj", "layers_to_transform": 0}, "`layers_to_transform` cannot be used .* is a str"),
    ({"target_modules": "q_proj", "layers_pattern": "layers"}, "`layers_pattern` cannot be used .* is a str"),
    ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
    ({"target_modules": r"(q_proj"}, r"target_modules is '\(q_proj', which is no regular expression \(missing \)"),
    ({"exclude_modules": "*.1"}, r"exclude_modules is '\*\.1', which is no regular expression \(nothing to repeat"),
    ({"target_modules": 3.5}, "target_modules is 3.5; expected a list of module names, a regular expression"),
    ({"target_modules": ["q_proj", 1]}, r"target_modules is \['q_proj', 1\]; expected a list"),
    ({"target_modules": {"q_proj": 8}}, "target_modules is {'q_proj': 8}; expected a list"),
    ({"exclude_modules": True}, "exclude_modules is True; expected a list of module names or"),
    ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; expected a list of module names such as"),
    ({"modules_to_save": [1]}, r"modules_to_save is \[1\]; expected a list"),
    ({"layers_to_transform": "1"}, "layers_to_transform is '1'; expected a layer index or a list of them"),
    ({"layers_to_transform": [0, 1.5]}, r"layers_to_transform is \[0, 1.5\]"),
    ({"layers_to_transform": True}, "layers_to_transform is True"),
    ({"layers_pattern": 1, "layers_to_transform": 1}, "layers_pattern is 1; expected the name of a layer list"),
    ({"trainable_token_indices": "x"}, "trainable_token_indices is 'x'; expected a list of token indices"),
    ({"trainable_token_indices": {"embed_tokens": 3}}, "trainable_token_indices is {'embed_tokens': 3}; expected"),
    ({"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\]; expected {module name"),
    ({"rank_pattern": {0: 4}}, "rank_pattern is {0: 4}; expected {module name"),
    ({"target_parameters": {"experts": 1}}, "target_parameters is {'experts': 1}; expected a list of names"),
    ({"svd": "fast"}, "svd is 'fast'; expected one of 'auto', 'exact', 'randomized'"),
    ({"svd": None}, "svd is None; expected one of"),
    ({"reg_update": "both"}, "reg_update is 'both'; expected one of 'coupled', 'decoupled'"),
    (
        {"reg_update": "decoupled", "reg_schedule": "cosine"},
        "reg_schedule is 'cosine'; expected one of 'lr'",
    ),
    ({"reg_schedule": "lr"}, "reg_schedule='lr' with reg_update='coupled'.*Drop reg_schedule"),
    ({"reg_schedule": "constant"}, "reg_schedule='constant' with reg_update='coupled'"),
    ({"init_weights": "pissa"}, "init_weights is 'pissa'; expected True or False"),
    ({"init_weights": 1}, "init_weights is 1; expected True or False"),
    ({"svd_seed": -1}, "svd_seed is -1; expected an integer >= 0"),
    ({"svd_seed": True}, "svd_seed is True"),
    ({"svd_seed": 1.5}, "svd_seed is 1.5"),
    ({"svd_energy": 0}, r"svd_energy is 0; expected a share in \(0, 1\)"),
    ({"svd_energy": 1.0}, "svd_energy is 1.0"),
    ({"svd_energy": float("nan")}, "svd_energy is nan"),
    ({"svd_energy": "0.99"}, "svd_energy is '0.99'"),
    ({"svd_energy": True}, "svd_energy is True"),
    ({"svd_energy": 0.99, "svd": "exact"}, "svd_energy=0.99 with svd='exact', which captures all"),
    ({"sorsa_dropout": 1.0}, r"sorsa_dropout is 1.0; expected a probability in \[0, 1\)"),
    ({"sorsa_dropout": -0.1}, "sorsa_dropout is -0.1"),
    ({"sorsa_dropout": float("nan")}, "sorsa_dropout is nan"),
    ({"sorsa_dropout": "0.1"}, "sorsa_dropout is '0.1'"),
    ({"sorsa_dropout": None}, "sorsa_dropout is None"),
    ({"gamma": -1e-3}, "gamma is -0.001; expected a finite number >= 0"),
    ({"gamma": float("nan")}, "gamma is nan"),
    ({"gamma": float("inf")}, "gamma is inf"),
    ({"gamma": True}, "gamma is True"),
    ({"gamma": "4e-4"}, "gamma is '4e-4'"),  # what YAML 1.1 makes of 4e-4
    ({"reg_update": "decoupled", "gamma": 0.6}, "gamma is 0.6 with reg_update='decoupled'; expected at most 0.5"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_a_value_that_cannot_be_honoured_is_a_typed_error_that_says_what_was_got(options, message):
    with pytest.raises(SORSAConfigError, match=message) as caught:
        SORSAConfig(**options)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SORSAError)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 1},
        {"gamma": 0},
        {"gamma": 10.0},
        {"reg_update": "decoupled", "gamma": 0.5},
        {"reg_update": "decoupled", "reg_schedule": "constant"},
        {"reg_update": "decoupled", "reg_schedule": "lr"},
        {"sorsa_dropout": 0.999},
        {"svd_seed": 0},
        {"svd_energy": 0.5, "svd": "randomized"},
        {"rank_pattern": None},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_values_on_the_border_are_accepted(options):
    config = SORSAConfig(**options)
    assert config.rank_pattern == {}
    assert config.resolved_gamma <= 10.0


@pytest.mark.parametrize("update", ["coupled", "decoupled"])
def test_gamma_left_open_is_the_default_of_the_update_and_stays_open_in_the_file(update, tmp_path):
    config = SORSAConfig(reg_update=update)
    assert config.resolved_gamma == DEFAULT_GAMMA[update]
    assert config.resolved_reg_schedule == "lr"
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["gamma"] is None


def test_the_coupled_default_is_the_published_scripts():
    assert SORSAConfig().reg_update == "coupled"
    assert SORSAConfig().resolved_gamma == 4e-4


def test_a_given_gamma_is_never_replaced_even_when_zero():
    assert SORSAConfig(gamma=0.0).resolved_gamma == 0.0
    assert SORSAConfig(reg_update="decoupled", gamma=0.0).resolved_gamma == 0.0


FULL = {
    "r": 5,
    "target_modules": ["q_proj", "down_proj"],
    "exclude_modules": ["lm_head"],
    "sorsa_dropout": 0.25,
    "modules_to_save": ["lm_head"],
    "layers_to_transform": 0,
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 3, r".*down.*": 2},
    "svd": "randomized",
    "svd_seed": 9,
    "svd_energy": 0.99,
    "gamma": 0.125,
    "reg_update": "decoupled",
    "reg_schedule": "constant",
}


@pytest.mark.parametrize("options", [{}, FULL], ids=["defaults", "everything"])
def test_a_config_survives_its_json_file(options, tmp_path):
    config = SORSAConfig(**options)
    config.save_pretrained(tmp_path)
    for reader in (PeftConfig, SORSAConfig):
        loaded = reader.from_pretrained(tmp_path)
        assert type(loaded) is SORSAConfig
        assert {**loaded.to_dict(), "inference_mode": False} == {**config.to_dict(), "inference_mode": False}


@settings(max_examples=20, deadline=None)
@given(
    r=st.integers(1, 4096),
    gamma=st.none() | st.floats(0, 0.5),
    dropout=st.floats(0, 1, exclude_max=True),
    update=st.sampled_from(["coupled", "decoupled"]),
    seed=st.integers(0, 2**31),
    pattern=st.dictionaries(st.text(min_size=1).map(re.escape), st.integers(1, 64), max_size=3),
)
def test_any_valid_config_equals_itself_after_json(r, gamma, dropout, update, seed, pattern, tmp_path_factory):
    config = SORSAConfig(
        r=r, gamma=gamma, sorsa_dropout=dropout, reg_update=update, svd_seed=seed, rank_pattern=pattern
    )
    directory = tmp_path_factory.mktemp("config")
    config.save_pretrained(directory)
    assert PeftConfig.from_pretrained(directory).to_dict() == config.to_dict()


def test_rank_pattern_ranks_are_integers_again_after_json(tmp_path):
    SORSAConfig(rank_pattern={"q_proj": 3}).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).rank_pattern == {"q_proj": 3}


def test_layer_zero_is_a_selection_and_not_absence():
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj"], layers_to_transform=0))
    assert [layer.name for layer in sorsa_layers(model)] == ["model.layers.0.self_attn.q_proj"]


def test_lists_of_module_names_become_sets_as_in_peft():
    config = SORSAConfig(target_modules=["v_proj", "q_proj", "q_proj"], exclude_modules=["lm_head"])
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.exclude_modules == {"lm_head"}
    assert SORSAConfig(target_modules="all-linear").target_modules == "all-linear"


def test_only_a_config_read_from_a_file_awaits_its_factors(tmp_path):
    config = SORSAConfig(r=2)
    assert not config.factors_from_file
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).factors_from_file
    assert SORSAConfig.from_pretrained(tmp_path).factors_from_file
    assert not SORSAConfig(**config.to_dict()).factors_from_file
    assert "factors_from_file" not in config.to_dict()
    assert "factors_from_file" not in json.loads((tmp_path / "adapter_config.json").read_text())


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
}


@pytest.mark.parametrize("from_file", [False, True], ids=["new", "from-file"])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_is_equal_and_awaits_its_factors_exactly_when_the_original_does(duplicate, from_file, tmp_path):
    config = SORSAConfig(r=3, gamma=0.01)
    if from_file:
        config.save_pretrained(tmp_path)
        config = PeftConfig.from_pretrained(tmp_path)
    twin = duplicate(config)
    assert twin is not config
    assert twin == config
    assert twin.peft_type is config.peft_type
    assert twin.factors_from_file is from_file


def test_replacing_an_option_of_a_new_config_still_factorises():
    assert not dataclasses.replace(SORSAConfig(r=3), r=4).factors_from_file


def test_a_pickled_config_opens_in_a_fresh_process_that_never_imported_the_package(tmp_path):
    config = SORSAConfig(r=3, rank_pattern={"q_proj": 2})
    config.save_pretrained(tmp_path)
    path = tmp_path / "configs.pickle"
    path.write_bytes(pickle.dumps([config, PeftConfig.from_pretrained(tmp_path)]))
    script = (
        "import pickle, sys; new, read = pickle.load(open(sys.argv[1], 'rb'));"
        "from peft.utils import PeftType; assert new.peft_type is PeftType.SORSA, new.peft_type;"
        "print(new.r, new.rank_pattern, new.factors_from_file, read.factors_from_file)"
    )
    output = subprocess.run([sys.executable, "-c", script, path], check=True, capture_output=True, text=True).stdout
    assert output.split("\n")[0] == "3 {'q_proj': 2} False True"


def test_a_config_of_a_dictionary_makes_a_new_adapter():
    config = get_peft_config({"peft_type": "SORSA", "r": 4, "target_modules": ["q_proj"]})
    assert not config.factors_from_file
    assert sorsa_layers(get_peft_model(tiny_llama(), config))[0].factors("default").base_checked


FILLED_IN_WRONGLY = {
    "base_storage": (5, ["float32"], {"q_proj": 3}),
    "lora_layouts": (
        [],
        "embedding",
        {"x": "embedding"},
        {"x": []},
        {"x": ["convolution", 3]},
        {"x": ["linear"]},
        {"x": ["embedding", 1]},
    ),
    "adapted_layers": (7, {"linear": "7"}),
    "auto_mapping": ("model", {"base_model_class": 5}),
    "base_model_name_or_path": (5, ["a"]),
    "fan_in_fan_out": ("yes", 1),
    "inference_mode": ("yes",),
    "rank_pattern": ({"(": 3},),
    "svd_seed": (2**63, 1e26),
}


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option, values in FILLED_IN_WRONGLY.items() for value in values]
)
def test_options_that_files_hold_are_checked_like_those_that_users_give(option, value):
    with pytest.raises(SORSAConfigError, match=option):
        SORSAConfig(**{option: value})
