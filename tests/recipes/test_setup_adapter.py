"""One config key: every word gives the method it names, every unknown or contradictory option a sentence."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
from builders.llama import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from transformers import HfArgumentParser, Trainer, TrainingArguments

from sorsa_plugin import AdapterSetup, registered_adapters, setup_adapter
from sorsa_plugin.errors import AdapterOptionsError
from sorsa_plugin.recipes.peft_methods import NEEDS_A_CALL
from sorsa_plugin.recipes.setup_adapter import SPELLINGS, VOCABULARY
from sorsa_transformers import AdapterArguments, SORSACallback

COMMON = {"r": 4, "target_modules": ["q_proj", "v_proj"], "dropout": 0.1, "modules_to_save": ["lm_head"]}

KINDS = {
    "sorsa": (PeftType.SORSA, {"r": 4, "sorsa_dropout": 0.1}),
    "qsorsa": (PeftType.SORSA, {"r": 4, "sorsa_dropout": 0.1, "residual_base": True}),
    "lora": (PeftType.LORA, {"r": 4, "lora_dropout": 0.1, "init_lora_weights": True, "use_dora": False}),
    "pissa": (PeftType.LORA, {"r": 4, "lora_dropout": 0.1, "init_lora_weights": "pissa"}),
    "olora": (PeftType.LORA, {"r": 4, "lora_dropout": 0.1, "init_lora_weights": "olora"}),
    "dora": (PeftType.LORA, {"r": 4, "lora_dropout": 0.1, "use_dora": True}),
    "rslora": (PeftType.LORA, {"r": 4, "lora_dropout": 0.1, "use_rslora": True}),
    "eva": (PeftType.LORA, {"r": 4, "lora_dropout": 0.1, "init_lora_weights": "eva"}),
    "adalora": (PeftType.ADALORA, {"target_r": 4, "init_r": 6, "lora_dropout": 0.1}),
    "miss": (PeftType.MISS, {"r": 4, "miss_dropout": 0.1}),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_word_gives_its_method_from_one_vocabulary(name):
    setup = setup_adapter({"adapter": name, **COMMON})
    kind, expected = KINDS[name]
    assert setup.adapter == name
    assert setup.peft_config.peft_type == kind
    assert {field: getattr(setup.peft_config, field) for field in expected} == expected
    assert setup.peft_config.target_modules == {"q_proj", "v_proj"}
    assert setup.peft_config.modules_to_save == ["lm_head"]


def test_every_registered_word_is_covered_here():
    assert set(registered_adapters()) == {*KINDS, "full"}


def test_full_fine_tuning_has_no_adapter_and_says_what_it_leaves_unread(caplog):
    setup = setup_adapter({"adapter": "full", **COMMON})
    assert (setup.peft_config, setup.callbacks) == (None, [])
    assert "Full fine-tuning has no adapter: r, target_modules, dropout, modules_to_save not used." in caplog.text
    model = object()
    assert setup.wrap(model) is model


def test_sorsa_comes_with_its_callback_and_its_block():
    setup = setup_adapter({"adapter": "sorsa", "sorsa": {"gamma": 0.2, "reg_update": "decoupled", "svd": "exact"}})
    assert [type(callback) for callback in setup.callbacks] == [SORSACallback]
    config = setup.peft_config
    assert (config.gamma, config.reg_update, config.svd) == (0.2, "decoupled", "exact")


def test_blocks_of_other_methods_wait_for_their_word():
    recipe = {"r": 4, "sorsa": {"gamma": 0.01}, "lora": {"lora_alpha": 8}, "vera": {"d_initial": 0.2}, "full": None}
    assert setup_adapter({"adapter": "sorsa", **recipe}).peft_config.gamma == 0.01
    assert setup_adapter({"adapter": "lora", **recipe}).peft_config.lora_alpha == 8
    assert setup_adapter({"adapter": "vera", **recipe}).peft_config.d_initial == 0.2


SPECIAL = {  # fields that these PEFT methods demand
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "cpt": {"cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1]},
    "frod": {},
}


@pytest.mark.parametrize("kind", [k.value.lower() for k in PEFT_TYPE_TO_CONFIG_MAPPING if k.value not in ("SORSA",)])
def test_any_method_that_peft_registers_takes_its_own_fields(kind):
    if kind in NEEDS_A_CALL:
        with pytest.raises(AdapterOptionsError, match=f"adapter: {kind} needs"):
            setup_adapter({"adapter": kind})
        return
    if kind == "adamss":
        pytest.importorskip("sklearn", reason="AdaMSS demands scikit-learn")
    own = SPECIAL.get(kind, {})
    setup = setup_adapter({"adapter": kind, kind: own, "task_type": "CAUSAL_LM"})
    assert isinstance(setup.peft_config, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.upper())])
    assert all(getattr(setup.peft_config, name) == value for name, value in own.items())


WORDS = {"r": 6, "dropout": 0.2, "target_modules": ["k_proj"], "task_type": "SEQ_CLS"}


@pytest.mark.parametrize(("spelled", "word"), [pair for pair in SPELLINGS.items() if pair[1] in WORDS])
def test_trls_and_axolotls_spellings_are_the_same_words(spelled, word):
    plain = setup_adapter({"adapter": "sorsa", word: WORDS[word]}).peft_config
    other = setup_adapter({"adapter": "sorsa", spelled: WORDS[word]}).peft_config
    assert plain.to_dict() == other.to_dict()


def test_axolotls_all_linear():
    assert setup_adapter({"adapter": "sorsa", "lora_target_linear": True}).peft_config.target_modules == "all-linear"
    unset = setup_adapter({"adapter": "sorsa", "lora_target_linear": False, "lora_target_modules": ["q_proj"]})
    assert unset.peft_config.target_modules == {"q_proj"}
    with pytest.raises(AdapterOptionsError, match="lora_target_linear is set and target_modules is"):
        setup_adapter({"adapter": "sorsa", "lora_target_linear": True, "lora_target_modules": ["q_proj"]})


def test_a_lora_recipes_alpha_is_reported_as_unused(caplog):
    caplog.set_level(logging.WARNING)
    setup_adapter({"adapter": "sorsa", "lora_alpha": 32})
    assert "alpha: 32 is not used by sorsa." in caplog.text
    caplog.clear()
    assert setup_adapter({"adapter": "lora", "lora_alpha": 32}).peft_config.lora_alpha == 32
    assert not caplog.text


@pytest.mark.parametrize("flag", ["use_dora", "peft_use_dora"])
def test_a_flag_that_names_a_method_is_that_method_or_an_error(flag):
    assert setup_adapter({"adapter": "lora", flag: True}).peft_config.use_dora
    assert setup_adapter({"adapter": "dora", flag: True}).peft_config.use_dora
    assert not setup_adapter({"adapter": "lora", flag: False}).peft_config.use_dora
    with pytest.raises(AdapterOptionsError, match=f"{flag} asks for 'dora' and adapter is 'sorsa'. Delete the line"):
        setup_adapter({"adapter": "sorsa", flag: True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "sorza"}, r"adapter is 'sorza'; expected one of .*Did you mean 'sorsa'\?"),
        ({"adapter": None}, "adapter is None; expected the name of an adapter type"),
        ({"r": 4}, "adapter is None"),
        ({"adapter": "sorsa", "rnak": 4}, "'rnak' is no option of an adapter"),
        ({"adapter": "sorsa", "target_module": []}, r"Did you mean 'target_modules'\?"),
        ({"adapter": "sorsa", "gamma": 1}, r"'gamma' is no option of an adapter; .* \(sorsa: \{...\}\)"),
        (
            {"adapter": "sorsa", "gamma": 1},
            r"It belongs into the block of .*: `sorsa: \{gamma: ...\}`",
        ),
        ({"adapter": "lora", "reg_update": "coupled"}, r"'reg_update' is no option .*`sorsa: \{reg_update: ...\}`"),
        ({"adapter": "sorsa", "sorsa_gamma": 1}, r"'sorsa_gamma' is no option .*`sorsa: \{gamma: ...\}`"),
        ({"adapter": "sorsa", "sorsa_dropout": 0.1}, r"'sorsa_dropout' is no .*`sorsa: \{sorsa_dropout: ...\}`"),
        ({"adapter": "sorsa", "sorsa_r": 8, "lora_r": 4}, r"'sorsa_r' is no option .* Did you mean 'r'\?"),
        ({"adapter": "sorsa", "sorsa_alpha": 8}, r"Did you mean 'alpha'\?"),
        ({"adapter": "sorsa", "learning_rate": 1e-3}, r"'learning_rate' is no .*`sorsa: \{learning_rate: ...\}`"),
        (
            {"adapter": "sorsa", "sorsa": {"learning_rate": 0}},
            "learning_rate in the block of sorsa is 0; expected",
        ),
        ({"adapter": "lora", "lora": {"learning_rate": "fast"}}, "learning_rate in the block of lora is 'fast'"),
        ({"adapter": "sorsa", "sorsa": {"gama": 1}}, r"'gama' is no option of sorsa; .* Did you mean 'gamma'\?"),
        ({"adapter": "sorsa", "sorsa": 3}, "sorsa is 3; expected a block of sorsa's own options"),
        ({"adapter": "sorsa", "sorsa": {"gamma": -1}}, "gamma is -1; expected a finite number"),
        ({"adapter": "sorsa", "sorsa": {"peft_type": "LORA"}}, "'peft_type' is no option of sorsa"),
        ({"adapter": "sorsa", "r": 4, "lora_r": 8}, "r is 4 and lora_r is 8, and both mean 'r'. Keep one."),
        ({"adapter": "sorsa", "r": 4, "sorsa": {"r": 8}}, "r is 4 outside the block of sorsa and 8 in it"),
        ({"adapter": "ia3", "r": 4}, "r is 4, and ia3 has no such option. Delete the line."),
        ({"adapter": "lora", "lora": {"init_lora_weights": "eva"}}, "init_lora_weights: eva needs data"),
        ({"adapter": "lora", "lora": {"init_lora_weights": "corda"}}, "init_lora_weights: corda needs peft.tuners"),
        ({"adapter": "pissa", "pissa": {"init_lora_weights": "olora"}}, "expected 'pissa' or 'pissa_niter_<n>'"),
        ({"adapter": "dora", "dora": {"use_dora": False}}, "use_dora is False, and adapter: dora means True"),
        ({"adapter": "full", "full": {"r": 1}}, "full fine-tuning has no options of its own; got r"),
        ({"adapter": "adalora", "r": 4, "adalora": {"target_r": 8}}, "both mean the final rank"),
        ({"adapter": "lora", "lora": {"layers_pattern": "x"}}, "PEFT refuses these options for lora"),
        (3, "The adapter's options are int; expected a mapping, a dataclass or a YAML file"),
    ],
    ids=lambda value: str(value)[:48],
)
def test_what_cannot_be_honoured_is_a_sentence(options, message):
    with pytest.raises((AdapterOptionsError, ValueError), match=message):
        setup_adapter(options)


def test_pissa_takes_its_number_of_iterations():
    setup = setup_adapter({"adapter": "pissa", "pissa": {"init_lora_weights": "pissa_niter_4"}})
    assert setup.peft_config.init_lora_weights == "pissa_niter_4"


def test_a_yaml_file_a_dataclass_and_a_mapping_say_the_same(tmp_path: Path):
    @dataclass
    class Options:
        adapter: str = "sorsa"
        r: int = 6
        alpha: int | None = None
        adapter_options: str = '{"gamma": 0.02}'

    path = tmp_path / "adapter.yaml"
    path.write_text("adapter: sorsa\nr: 6\nsorsa: {gamma: 0.02}\n")
    mapping = {"adapter": "sorsa", "r": 6, "sorsa": {"gamma": 0.02}}
    configs = [setup_adapter(source).peft_config.to_dict() for source in (path, str(path), Options(), mapping)]
    assert all(config == configs[0] for config in configs)
    assert configs[0]["gamma"] == 0.02


def test_files_that_cannot_be_read_are_a_sentence(tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("adapter: [")
    for path in (tmp_path / "bad.yaml", tmp_path / "absent.yaml"):
        with pytest.raises(AdapterOptionsError, match=r"(?s)cannot be read as YAML: .* Give the path of a recipe"):
            setup_adapter(path)
    with pytest.raises(AdapterOptionsError, match=r"(?s)adapter_options cannot be read: .* Write it as JSON"):
        setup_adapter({"adapter": "sorsa", "adapter_options": "{"})


def test_the_mapping_given_is_not_changed():
    options: dict[str, Any] = {"adapter": "sorsa", "r": 4, "sorsa": {"gamma": 0.1}, "lora_target_linear": True}
    before = {**options, "sorsa": dict(options["sorsa"])}
    setup_adapter(options)
    assert options == before


@given(
    r=st.integers(1, 64),
    dropout=st.floats(0, 0.9),
    names=st.lists(st.sampled_from(["q_proj", "k_proj", "up_proj"]), min_size=1, unique=True),
    name=st.sampled_from(sorted(set(KINDS) - {"adalora"})),
)
def test_words_arrive_whatever_the_method(r, dropout, names, name):
    config = setup_adapter({"adapter": name, "r": r, "dropout": dropout, "target_modules": names}).peft_config
    assert config.r == r
    assert config.target_modules == set(names)
    field = {"sorsa": "sorsa_dropout", "qsorsa": "sorsa_dropout", "miss": "miss_dropout"}.get(name, "lora_dropout")
    assert getattr(config, field) == dropout


def test_arguments_of_a_script_reach_the_adapter():
    parser = HfArgumentParser(AdapterArguments)
    line = "--adapter sorsa --r 6 --target_modules q_proj k_proj --adapter_options {'gamma':0.5}".replace("'", '"')
    (arguments,) = parser.parse_args_into_dataclasses(line.split())
    config = setup_adapter(arguments).peft_config
    assert isinstance(config, peft.PeftConfig)
    assert (config.r, config.target_modules, config.gamma) == (6, {"q_proj", "k_proj"}, 0.5)
    (arguments,) = parser.parse_args_into_dataclasses(["--adapter", "sorsa", "--target_modules", "all-linear"])
    assert setup_adapter(arguments).peft_config.target_modules == "all-linear"


def test_every_word_of_the_vocabulary_is_explained():
    assert all(text for text in VOCABULARY.values())


def test_two_spellings_of_one_value_agree_however_a_command_line_wrote_it():
    recipe = {"adapter": "sorsa", "target_modules": "all-linear", "lora_target_modules": ["all-linear"]}
    for given_first in (recipe, dict(reversed(recipe.items()))):
        assert setup_adapter(given_first).peft_config.target_modules == "all-linear"


def test_callbacks_that_a_setup_brings_along_are_not_added_again():
    mine = SORSACallback()
    config = setup_adapter({"adapter": "sorsa", **COMMON}).peft_config
    assert AdapterSetup("mine", config, [mine]).callbacks == [mine]
    assert [type(callback) for callback in AdapterSetup("mine", config).callbacks] == [SORSACallback]


def test_one_word_switches_the_method_and_its_learning_rate():
    recipe = {"r": 4, "sorsa": {"learning_rate": 1e-3, "gamma": 0.01}, "lora": {"learning_rate": 2e-4}}
    rates = {
        name: setup_adapter({"adapter": name, **recipe}).learning_rate for name in ("sorsa", "lora", "dora", "full")
    }
    assert rates == {"sorsa": 1e-3, "lora": 2e-4, "dora": None, "full": None}
    assert setup_adapter({"adapter": "sorsa", **recipe}).peft_config.gamma == 0.01


@pytest.mark.parametrize(("rate", "lines"), [(1e-3, 0), (5e-5, 1)])
def test_a_trainer_with_another_rate_than_the_block_names_gets_one_line(rate, lines, tmp_path, caplog):
    setup = setup_adapter({"adapter": "sorsa", "r": 2, "target_modules": ["q_proj"], "sorsa": {"learning_rate": 1e-3}})
    arguments = TrainingArguments(str(tmp_path), learning_rate=rate, use_cpu=True, report_to="none")
    setup.add_callbacks(Trainer(setup.wrap(tiny_llama()), arguments))
    assert caplog.text.count("The block of sorsa names learning_rate 0.001; the trainer has 5e-05.") == lines
