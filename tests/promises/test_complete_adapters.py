"""A saved adapter is complete: exact without a decomposition, refused by name where it is damaged."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from builders.llama import tiny_llama
from builders.one_layer import assert_same_tensors, perturb, refuse_to_factorise
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import sorsa_plugin.tuner.initialise
from sorsa_plugin import SORSAConfig, save_adapter
from sorsa_plugin.errors import FactorsNotLoadedError, IncompleteAdapterError, RankError
from sorsa_plugin.layers.factors import FROZEN, OFFSETS
from sorsa_plugin.model_card import HEADING, complete_model_card
from sorsa_plugin.regularizer.trained_factors import sorsa_layers

FILE = "adapter_model.safetensors"
LAYERS = 14


def trained(adapter: str = "default", seed: int = 3, base=None, **options) -> PeftModel:
    """A tiny Llama with an adapter that has moved, in eval mode."""
    options = {"r": 3, "target_modules": "all-linear", **options}
    base = tiny_llama() if base is None else base
    model = get_peft_model(base, SORSAConfig(**options), adapter_name=adapter)
    perturb(model, adapter, seed=seed)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directory of a saved adapter, and the logits of the model that saved it; tests copy what they damage."""
    directory = tmp_path_factory.mktemp("saved")
    model = trained()
    model.save_pretrained(directory)
    tokens = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return directory, model(tokens).logits, model.state_dict()


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
        model = trained(name, seed=seed, r=3 + seed)
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


# -- 16 bits ---------------------------------------------------------------------------------------------------------


def changes(model) -> dict[str, torch.Tensor]:
    return {layer.name: layer.get_delta_weight("default").detach().double() for layer in sorsa_layers(model)}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("dtype", "roundoff"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_a_16_bit_file_is_about_half_as_large_and_rounds_the_change_only(
    saved, tmp_path, dtype, roundoff, low_cpu_mem_usage
):
    model = PeftModel.from_pretrained(tiny_llama(), saved[0])
    save_adapter(model, tmp_path, dtype=dtype)
    tensors = load_file(tmp_path / FILE)
    found = {name.rsplit(".", 1)[1]: tensor.dtype for name, tensor in tensors.items()}
    assert found.pop("fingerprint") == torch.float32
    assert set(found.values()) == {getattr(torch, dtype)}
    factors = sum(t.numel() for name, t in tensors.items() if not name.endswith("fingerprint"))
    assert (saved[0] / FILE).stat().st_size - (tmp_path / FILE).stat().st_size == pytest.approx(2 * factors, rel=0.02)

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {tensor.dtype for tensor in adapter_tensors(loaded).values()} == {torch.float32}
    exact = changes(model)
    for name, change in changes(loaded).items():
        # Each term of the change is a product of three rounded numbers. Rounding errs by at most u relative, by about
        # 0.43 u in the mean square over a binade; three independent ones by 0.74 u in the norm. The bound is u.
        assert (change - exact[name]).norm() <= roundoff * exact[name].norm(), name


def test_saving_in_16_bits_leaves_the_model_in_fp32(saved, tmp_path, tokens):
    model = PeftModel.from_pretrained(tiny_llama(), saved[0])
    save_adapter(model, tmp_path, dtype="bfloat16")
    assert torch.equal(model(tokens).logits, saved[1])


def test_the_default_of_save_adapter_is_the_file_of_save_pretrained(saved, tmp_path):
    save_adapter(PeftModel.from_pretrained(tiny_llama(), saved[0]), tmp_path)
    assert (tmp_path / FILE).read_bytes() == (saved[0] / FILE).read_bytes()


def test_save_adapter_saves_the_named_adapter(tmp_path):
    model = trained()
    model.add_adapter("second", SORSAConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path, adapter_name="second", dtype="float16")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"second"}
    assert len(load_file(tmp_path / "second" / FILE)) == 2 * 7


def test_an_unknown_dtype_is_an_error_before_anything_is_written(saved, tmp_path):
    model = PeftModel.from_pretrained(tiny_llama(), saved[0])
    with pytest.raises(ValueError, match="dtype is 'int8'; expected one of float32, bfloat16, float16"):
        save_adapter(model, tmp_path / "new", dtype="int8")
    assert not (tmp_path / "new").exists()


# -- damaged files ---------------------------------------------------------------------------------------------------

DAMAGED_LAYER = r"layers\.1\.mlp\.up_proj"


def damage(directory, target, change) -> None:
    """A copy of a saved adapter whose tensors went through `change`."""
    shutil.copytree(directory, target, dirs_exist_ok=True)
    save_file(change(load_file(directory / FILE)), target / FILE)


def without(pattern: str):
    return lambda tensors: {name: t for name, t in tensors.items() if not re.search(pattern, name)}


def reshaped(part: str):
    def change(tensors):
        name = next(n for n in tensors if re.search(rf"{DAMAGED_LAYER}\..*{part}$", n))
        return {**tensors, name: tensors[name][..., :-1].contiguous()}

    return change


DAMAGES = {
    **{f"without-{part}": (without(rf"{DAMAGED_LAYER}\..*\.{part}$"), rf"lacks {part} of .*{DAMAGED_LAYER}")
       for part in (*OFFSETS, *FROZEN)},
    "without-frozen": (without(r"\.(U0|S0|V0)$"), r"lacks U0, S0, V0 of .*q_proj"),
    "without-a-layer": (without(DAMAGED_LAYER), rf"no tensors for 1 of the 14 adapted layers.*{DAMAGED_LAYER}"),
    "without-half-the-layers": (without(r"layers\.1\."), r"no tensors for 7 of the 14 adapted layers"),
    **{f"other-shape-of-{part}": (reshaped(part), rf"{DAMAGED_LAYER}.*{part} has shape \(.*expected \(")
       for part in ("dU", "V0", "fingerprint")},
}  # fmt: skip


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_by_layer_and_part(saved, tmp_path, tokens, change, message, low_cpu_mem_usage):
    damage(saved[0], tmp_path, change)
    with pytest.raises(IncompleteAdapterError, match=message):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("change", [DAMAGES["without-U0"][0], DAMAGES["without-a-layer"][0]], ids=["part", "layer"])
def test_a_refused_second_adapter_is_never_used_half_loaded(saved, tmp_path, tokens, change):
    damage(saved[0], tmp_path, change)
    model = trained(seed=5)
    expected = model(tokens).logits
    with pytest.raises(IncompleteAdapterError):
        model.load_adapter(tmp_path, adapter_name="second")
    assert torch.equal(model(tokens).logits, expected)
    assert all(layer.factors("second").pending for layer in sorsa_layers(model))
    model.set_adapter("second")
    with pytest.raises(FactorsNotLoadedError):
        model(tokens)


def test_a_file_with_factors_of_other_layers_alone_is_refused_and_changes_nothing(tmp_path, tokens):
    """What resuming with other target modules comes to; PEFT would load nothing and say nothing."""
    get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["v_proj"]))
    perturb(model)
    expected = model(tokens).logits
    with pytest.raises(
        IncompleteAdapterError,
        match=r"any of the 2 adapted layers, but for 2 others, the first of them model.layers.0.self_attn.q_proj",
    ):
        model.load_adapter(tmp_path, adapter_name="default", is_trainable=True)
    assert torch.equal(model(tokens).logits, expected)


def test_the_base_models_weights_load_into_an_adapted_model_without_its_adapter(tokens):
    model = trained(seed=5)
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".sorsa_" not in name}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert len(missing) == 7 * len(sorsa_layers(model))
    assert not unexpected


def test_a_file_of_another_method_is_not_taken_for_a_second_adapter(saved, tmp_path, tokens):
    get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    shutil.copy(saved[0] / "adapter_config.json", tmp_path)
    model = trained(seed=5)
    model.load_adapter(tmp_path, adapter_name="second")
    model.set_adapter("second")
    with pytest.raises(FactorsNotLoadedError):
        model(tokens)


def test_a_refused_file_leaves_an_adapter_as_it_was(saved, tmp_path, tokens):
    from peft import set_peft_model_state_dict

    damage(saved[0], tmp_path, DAMAGES["without-U0"][0])
    model = trained(seed=5)
    expected = model(tokens).logits
    with pytest.raises(IncompleteAdapterError):
        set_peft_model_state_dict(model, load_file(tmp_path / FILE))
    assert torch.equal(model(tokens).logits, expected)


def test_a_truncated_file_is_an_error(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    content = (saved[0] / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(Exception, match=r"(?i)header|incomplete|invalid"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a safetensors file"], ids=["empty", "garbage"])
def test_a_corrupted_file_is_an_error(saved, tmp_path, content):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(Exception, match=r"(?i)header|invalid"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_tensors_of_another_method_are_never_taken_for_the_adapter(saved, tmp_path, tokens):
    damage(saved[0], tmp_path, lambda tensors: {n.replace("sorsa_factors", "lora_A"): t for n, t in tensors.items()})
    with pytest.raises((FactorsNotLoadedError, IncompleteAdapterError)):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)(tokens)


def test_another_rank_in_the_config_than_in_the_file_is_an_error(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(IncompleteAdapterError, match=r"dU has shape \(32, 3\).*expected \(32, 4\).*rank"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_rank_that_does_not_fit_the_base_leaves_nothing_on_disk(tmp_path):
    with pytest.raises(RankError):
        trained(r=1000).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- model card ------------------------------------------------------------------------------------------------------


def test_the_model_card_says_how_to_load_the_adapter_once_however_often_it_is_saved(tmp_path):
    model = trained(gamma=0.25)
    for _ in range(3):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count(HEADING) == 1
    assert card.count("import sorsa_plugin") == 1
    assert card.count("arXiv:2409.00055") == 1
    assert "(gamma 0.25, coupled). Rank 3" in card
    header = card.split("---")[1]
    assert len(re.findall(r"^- sorsa$", header, re.MULTILINE)) == 1


def test_a_card_that_a_person_wrote_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags:\n- mine\n---\n\n# My adapter\n\nTrained with care.\n")
    trained().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Trained with care." in card
    assert card.count(HEADING) == 1
    assert re.search(r"^- sorsa$", card.split("---")[1], re.MULTILINE)


def test_a_config_saved_alone_writes_no_card(tmp_path):
    SORSAConfig(r=2).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json"}


def test_sections_of_the_users_own_stay_in_the_card(tmp_path):
    model = trained(seed=5)
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\n## My results\n\nGood ones.\n")
    model.save_pretrained(tmp_path)
    assert card.read_text().count(HEADING) == 1
    assert card.read_text().rstrip().endswith("## My results\n\nGood ones.")


def test_an_adapter_of_another_name_has_its_section_in_the_card_that_peft_puts_beside_its_folder(tmp_path):
    base = tiny_llama()
    get_peft_model(base, SORSAConfig(r=2, target_modules=["q_proj"]), adapter_name="mine").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count(HEADING) == 1
    assert not (tmp_path / "mine" / "README.md").exists()


OTHERS_CARDS = {
    "of a project": b"# My project\n\nNotes.\n",
    "of another adapter": b"---\nlibrary_name: peft\ntags:\n- lora\n---\n\n# A LoRA\n",
    "with no metadata between its rules": b"---\nA rule: with: colons\n---\n",
    "in another encoding": "---\nlicense: mit\n---\ncaf\u00e9\n".encode("latin1"),
}


@pytest.mark.parametrize("place", ["run", "."])
@pytest.mark.parametrize("card", OTHERS_CARDS.values(), ids=OTHERS_CARDS.keys())
def test_a_card_that_nobody_wrote_for_the_adapter_is_left_alone_and_loses_no_weights(card, place, tmp_path):
    """transformers' own save_pretrained writes none, whatever lies there or in the directory above."""
    model = tiny_llama()
    model.add_adapter(SORSAConfig(r=2, target_modules=["q_proj"]))
    (tmp_path / "run").mkdir()
    (tmp_path / place / "README.md").write_bytes(card)
    model.save_pretrained(tmp_path / "run")
    assert (tmp_path / "run" / FILE).is_file()
    assert [path.read_bytes() for path in tmp_path.rglob("README.md")] == [card]


def test_the_card_in_the_folder_of_an_adapter_of_another_name_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_bytes(OTHERS_CARDS["of a project"])
    base = tiny_llama()
    get_peft_model(base, SORSAConfig(r=2, target_modules=["q_proj"]), adapter_name="mine").save_pretrained(tmp_path)
    assert (tmp_path / "mine" / "README.md").read_bytes() == OTHERS_CARDS["of a project"]
    assert (tmp_path / "README.md").read_text().count(HEADING) == 1


@pytest.mark.parametrize("name", ["with no metadata between its rules", "in another encoding"])
def test_a_card_that_cannot_be_read_stops_nobody(name, tmp_path, caplog):
    (tmp_path / "README.md").write_bytes(OTHERS_CARDS[name])
    complete_model_card(str(tmp_path), SORSAConfig(r=2))
    assert "README.md stays without SORSA's section" in caplog.text
    assert (tmp_path / "README.md").read_bytes() == OTHERS_CARDS[name]


def test_a_tag_that_a_person_wrote_as_one_word_stays_one(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: mine\n---\n\n# My adapter\n")
    complete_model_card(str(tmp_path), SORSAConfig(r=2))
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["mine", "sorsa"]


def test_loading_waits_for_no_other_process(monkeypatch, tmp_path):
    """One process of a run may load what it saved, to merge it: making a new adapter is a collective, this is none."""
    asked = []
    monkeypatch.setattr(sorsa_plugin.tuner.initialise, "_owners", lambda *_: asked.append(1) or [])
    trained().save_pretrained(tmp_path)
    assert asked
    asked.clear()
    PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert not asked
