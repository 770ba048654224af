"""A saved adapter is complete: it loads exactly, without a decomposition."""

from __future__ import annotations

import pytest
import torch
from builders.adapters import assert_same_tensors, perturb, refuse_to_factorise, trained
from builders.llama import tiny_llama
from builders.saved import FILE, saved_with_outputs
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import sorsa_plugin.tuner.initialise
from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import FactorsNotLoadedError, RankError
from sorsa_plugin.files.adapter_format import FROZEN, OFFSETS
from sorsa_plugin.layers.layer import sorsa_layers

LAYERS = 14


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directory of a saved adapter, its logits and tensors; tests copy what they damage."""
    return saved_with_outputs(tmp_path_factory.mktemp("saved"))


def adapter_tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".sorsa_factors." in name}


# -- exact -----------------------------------------------------------------------------------------------------------


def test_the_file_holds_offsets_frozen_factors_and_fingerprint_of_every_layer_in_fp32(saved):
    tensors = load_file(saved[0] / FILE)
    assert len(tensors) == LAYERS * 7
    for part in (*OFFSETS, *FROZEN):
        assert sum(name.endswith(f"sorsa_factors.{part}") for name in tensors) == LAYERS
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not [name for name in tensors if "default" in name]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_is_exact_and_factorises_nothing(saved, tokens, is_trainable, low_cpu_mem_usage, monkeypatch):
    directory, logits, state = saved
    refuse_to_factorise(monkeypatch)
    loaded = PeftModel.from_pretrained(
        tiny_llama(), directory, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(loaded.eval()(tokens).logits, logits)
    assert_same_tensors(loaded.state_dict(), state)
    trains = {name.rsplit(".", 1)[1] for name, p in loaded.named_parameters() if p.requires_grad}
    assert trains == (set(OFFSETS) if is_trainable else set())


def test_saving_what_was_loaded_gives_the_same_file(saved, tmp_path):
    PeftModel.from_pretrained(tiny_llama(), saved[0]).save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == (saved[0] / FILE).read_bytes()


def test_every_option_survives_saving_and_loading(tmp_path):
    model = trained(gamma=0.25, reg_update="decoupled", rank_pattern={"q_proj": 2}, svd_seed=4, svd="randomized")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    before, after = (m.peft_config["default"].to_dict() for m in (model, loaded))
    filled_in = {"inference_mode": True, "auto_mapping": after["auto_mapping"]}  # by PEFT, while saving
    assert {**before, **filled_in} == after
    assert before["base_storage"] == "float32"
    assert_same_tensors(adapter_tensors(loaded), adapter_tensors(model))


def test_training_goes_on_from_a_loaded_adapter_as_if_it_had_never_been_saved(tmp_path, tokens):
    def train(model) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model = trained()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).eval()
    train(model)
    train(loaded)
    assert_same_tensors(adapter_tensors(loaded), adapter_tensors(model))


@pytest.mark.parametrize("names", [("default", "other"), ("one", "two")], ids="-".join)
def test_adapters_of_any_name_load_beside_each_other_and_exactly(names, tokens, tmp_path, monkeypatch):
    logits = {}
    for seed, name in enumerate(names):
        model = trained(adapter=name, seed=seed, r=3 + seed)
        logits[name] = model(tokens).logits
        model.save_pretrained(tmp_path)
    paths = {name: tmp_path if name == "default" else tmp_path / name for name in names}

    refuse_to_factorise(monkeypatch)
    loaded = PeftModel.from_pretrained(tiny_llama(), paths[names[0]], adapter_name="first")
    loaded.load_adapter(paths[names[1]], adapter_name="second")
    for mine, theirs in (("first", names[0]), ("second", names[1]), ("first", names[0])):
        loaded.set_adapter(mine)
        assert torch.equal(loaded(tokens).logits, logits[theirs])


def test_only_the_selected_adapter_is_saved(tmp_path):
    model = trained()
    model.add_adapter("second", SORSAConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert not (tmp_path / FILE).exists()
    assert len(load_file(tmp_path / "second" / FILE)) == 2 * 7


def test_a_cloned_second_adapter_is_saved_whole(tmp_path, tokens):
    model = trained()
    model.add_adapter("ref", SORSAConfig(r=3, target_modules="all-linear"))
    perturb(model, "ref", seed=5)
    model.set_adapter("ref")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ref")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_saving_while_merged_saves_the_same_adapter(saved, tmp_path):
    model = PeftModel.from_pretrained(tiny_llama(), saved[0])
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == (saved[0] / FILE).read_bytes()


def test_modules_to_save_travel_with_the_adapter(tmp_path, tokens):
    model = trained(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lm_head" in name and p.requires_grad).mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(tokens).logits, model(tokens).logits)


def test_an_adapter_saved_from_a_launch_of_many_processes_loads_in_one(tmp_path, tokens, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = trained()
    model.save_pretrained(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(tokens).logits, model(tokens).logits)
    monkeypatch.setenv("WORLD_SIZE", "2")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).eval()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert {n.rsplit(".", 1)[1] for n, p in loaded.named_parameters() if p.requires_grad} == set(OFFSETS)


# -- a config alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["forward", "merge", "get_factors", "to"])
def test_a_saved_config_without_its_tensors_is_an_error_with_both_remedies(saved, tokens, use):
    model = get_peft_model(tiny_llama(), PeftConfig.from_pretrained(saved[0]))
    uses = {
        "forward": lambda: model(tokens),
        "merge": lambda: model.merge_adapter(),
        "get_factors": lambda: sorsa_layers(model)[0].get_factors(),
        "to": lambda: model.to("cpu"),
    }
    with pytest.raises(FactorsNotLoadedError, match=r"PeftModel\.from_pretrained.*factors_from_file = False"):
        uses[use]()


def test_the_remedy_starts_a_new_adapter_with_the_saved_options(saved, tokens):
    config = PeftConfig.from_pretrained(saved[0])
    config.factors_from_file = False
    base = tiny_llama()
    expected = base(tokens).logits
    model = get_peft_model(base, config)
    assert torch.equal(model(tokens).logits, expected)
    assert sorsa_layers(model)[0].factors("default").rank == 3


# -- damaged files ---------------------------------------------------------------------------------------------------


def test_a_rank_that_does_not_fit_the_base_leaves_nothing_on_disk(tmp_path):
    with pytest.raises(RankError):
        trained(rank_pattern={".*": 1000}).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- model card ------------------------------------------------------------------------------------------------------


def test_loading_waits_for_no_other_process(monkeypatch, tmp_path):
    """One process of a run may load what it saved, to merge it: making a new adapter is a collective, this is none."""
    asked = []
    monkeypatch.setattr(sorsa_plugin.tuner.initialise, "_owners", lambda *_: asked.append(1) or [])
    trained().save_pretrained(tmp_path)
    assert asked
    asked.clear()
    PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert not asked
