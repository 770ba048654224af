"""`sorsa init` writes, one weight at a time, exactly what get_peft_model would start from."""

from __future__ import annotations

import json

import pytest
import torch
from builders.adapters import refuse_to_factorise
from builders.llama import tied_llama, tiny_llama, token_batches
from builders.models import tiny_gpt2, tiny_gpt_oss, tiny_llava, tiny_mixtral, tiny_siglip, tiny_whisper
from builders.saved import everything
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)

import sorsa_plugin.tools.init_adapter
import sorsa_plugin.tuner.initialise
from sorsa_plugin import SORSAConfig, init_adapter
from sorsa_plugin.errors import (
    BaseFilesError,
    DecompositionError,
    OutputExistsError,
    RankError,
    SORSAConfigError,
)
from sorsa_plugin.layers.layer import sorsa_layers

EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


CASES = {
    "all-linear": (tiny_llama, {"target_modules": "all-linear"}),
    "bfloat16": (lambda: tiny_llama(torch.bfloat16), {"target_modules": ["q_proj", "up_proj"]}),
    "options": (
        tiny_llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 5},
            "svd": "randomized",
            "svd_seed": 3,
            "gamma": 0.2,
            "reg_update": "decoupled",
            "layers_to_transform": [1],
            "sorsa_dropout": 0.1,
        },
    ),
    "conv1d": (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "fused-experts": (tiny_mixtral, {"target_modules": ["q_proj", "o_proj"]}),
    "prefix-added": (lambda: tiny_llama().model, {"target_modules": ["k_proj"]}),
    "modules-to-save": (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied-head": (lambda: tied_llama(torch.bfloat16), {"target_modules": ["lm_head", "down_proj"]}),
    "experts": (tiny_mixtral, {"target_modules": ["q_proj"], **EXPERTS}),
    "experts-bfloat16": (lambda: tiny_mixtral().bfloat16(), {"target_modules": [], **EXPERTS}),
    "experts-stored-fused": (tiny_gpt_oss, {"target_modules": ["q_proj"], **EXPERTS}),
    "embedding-and-head": (tiny_llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied-embedding": (
        lambda: tied_llama(torch.bfloat16),
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "tied-to-the-head": (
        lambda: tied_llama(torch.bfloat16),
        {"target_modules": ["lm_head"], "ensure_weight_tying": True},
    ),
    "tokens": (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "tokens-bfloat16-tied": (
        lambda: tied_llama(torch.bfloat16),
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ),
    "tokens-of-two": (
        tiny_llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [9, 4]}},
    ),
    "convolutions": (tiny_whisper, {"target_modules": ["conv1", "embed_positions", "q_proj"], "task_type": None}),
    "attention": (tiny_siglip, {"target_modules": ["head.attention", "patch_embedding"], "task_type": None}),
    "renamed": (tiny_llava, {"target_modules": r".*language_model.*q_proj", "task_type": None}),
}


def options_of(text: bytes) -> dict:
    """A saved config; PEFT writes target_modules in the order of a set."""
    options = json.loads(text)
    if isinstance(options["target_modules"], list):
        options["target_modules"].sort()
    return options


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:(Model has|Model with|You have)")
def test_every_file_is_the_one_that_save_pretrained_writes(tmp_path, case):
    make, options = CASES[case]
    options = {"r": 3, "task_type": "CAUSAL_LM", **options}
    make().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    report = init_adapter(tmp_path / "base", tmp_path / "ours", SORSAConfig(**options), progress=False)
    loader = AutoModelForCausalLM if options["task_type"] else type(make())
    model = get_peft_model(loader.from_pretrained(tmp_path / "base"), SORSAConfig(**options))
    model.save_pretrained(tmp_path / "peft")
    names = sorted(path.name for path in (tmp_path / "peft").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        ours, pefts = ((tmp_path / directory / name).read_bytes() for directory in ("ours", "peft"))
        if name == "adapter_config.json":
            ours, pefts = options_of(ours), options_of(pefts)
        assert ours == pefts, name
    assert report.trainable_parameters == model.get_nb_trainable_parameters()[0]
    assert report.layers == tuple(layer.name for layer in sorsa_layers(model) if layer.sorsa_factors)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "ours", "peft"}


def losses(model, directory) -> list[float]:
    arguments = TrainingArguments(
        str(directory), max_steps=3, learning_rate=1e-3, logging_steps=1, report_to="none", use_cpu=True, seed=1
    )
    trainer = Trainer(model, arguments, train_dataset=token_batches(24))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_training_starts_from_it_without_factorising_and_goes_the_same_way(tmp_path, monkeypatch):
    def config():
        return SORSAConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")

    tiny_llama().save_pretrained(tmp_path / "base")
    expected = losses(get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config()), tmp_path / "a")
    init_adapter(tmp_path / "base", tmp_path / "adapter", config(), progress=False)
    refuse_to_factorise(monkeypatch)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert losses(model, tmp_path / "b") == expected


def test_one_weight_is_in_memory_at_a_time(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "base")
    seen = []
    original = sorsa_plugin.tools.init_adapter._empty

    def counting(layer):
        seen.append(layer)
        held = [other.name for other in layers_of["model"] if not other.base_matrix().is_meta]
        assert held == [layer.name]
        original(layer)
        assert layer.base_matrix().is_meta
        assert layer.factors("default").pending

    layers_of = {}
    adapt = sorsa_plugin.tools.init_adapter.adapt_empty

    def remembering(*args):
        model = adapt(*args)
        layers_of["model"] = list(sorsa_layers(model))
        return model

    monkeypatch.setattr(sorsa_plugin.tools.init_adapter, "_empty", counting)
    monkeypatch.setattr(sorsa_plugin.tools.init_adapter, "adapt_empty", remembering)
    config = SORSAConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    init_adapter(tmp_path / "base", tmp_path / "adapter", config, progress=False)
    assert len(seen) == 14


def test_the_dtype_that_the_base_will_be_loaded_in_is_honoured(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    config = SORSAConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    init_adapter(tmp_path / "base", tmp_path / "ours", config, dtype=torch.bfloat16, progress=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    get_peft_model(base, config).save_pretrained(tmp_path / "peft")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["base_storage"] == "bfloat16"


def test_what_cannot_be_done_is_said_before_anything_is_factorised(llama_files, whole, tmp_path, monkeypatch):
    refuse_to_factorise(monkeypatch)
    output = tmp_path / "adapter"
    causal = {"task_type": "CAUSAL_LM"}
    cases = [
        (BaseFilesError, r"becomes score\.weight", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
        (
            RankError,
            "has only 16 singular triplets",
            {"rank_pattern": {"k_proj": 17}, "target_modules": ["k_proj"], **causal},
        ),
        (SORSAConfigError, "Target modules .*nope.* not found", {"target_modules": ["nope"], **causal}),
        (SORSAConfigError, "init_weights=False", {"init_weights": False, "target_modules": ["q_proj"], **causal}),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            init_adapter(llama_files, output, SORSAConfig(**options), progress=False)
    with pytest.raises(SORSAConfigError, match="config is that of a saved adapter"):
        init_adapter(llama_files, output, SORSAConfig.from_pretrained(str(whole)), progress=False)
    with pytest.raises(OutputExistsError):
        init_adapter(llama_files, whole, everything(), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_weight_with_nan_is_named_and_leaves_no_output(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(DecompositionError, match=r"layers\.1\.mlp\.up_proj holds NaN"):
        init_adapter(tmp_path / "base", tmp_path / "adapter", everything(), progress=False)
    assert not (tmp_path / "adapter").exists()
