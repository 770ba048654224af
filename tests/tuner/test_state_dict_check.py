"""A damaged or foreign file is refused by layer and part, and changes nothing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from builders.adapters import perturb, trained
from builders.llama import tiny_llama
from builders.saved import FILE, damaged, renamed, reshaped, saved_with_outputs, without
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft import __version__ as peft_version
from safetensors.torch import load_file

from sorsa_plugin import SORSAConfig, export_lora
from sorsa_plugin.errors import BaseMismatchError, FactorsNotLoadedError, IncompleteAdapterError
from sorsa_plugin.files.adapter_format import FROZEN, OFFSETS, plain_layouts
from sorsa_plugin.layers.layer import sorsa_layers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directory of a saved adapter, its logits and tensors; tests copy what they damage."""
    return saved_with_outputs(tmp_path_factory.mktemp("saved"))


DAMAGED_LAYER = r"layers\.1\.mlp\.up_proj"

DAMAGES = {
    **{f"without-{part}": (without(rf"{DAMAGED_LAYER}\..*\.{part}$"), rf"lacks {part} of .*{DAMAGED_LAYER}")
       for part in (*OFFSETS, *FROZEN)},
    "without-frozen": (without(r"\.(U0|S0|V0)$"), r"lacks U0, S0, V0 of .*q_proj"),
    "without-a-layer": (without(DAMAGED_LAYER), rf"no tensors for 1 of the 14 adapted layers.*{DAMAGED_LAYER}"),
    "without-half-the-layers": (without(r"layers\.1\."), r"no tensors for 7 of the 14 adapted layers"),
    **{f"other-shape-of-{part}": (reshaped(rf"{DAMAGED_LAYER}\..*{part}$"),
       rf"{DAMAGED_LAYER}.*{part} has shape \(.*expected \(")
       for part in ("dU", "V0", "fingerprint")},
}  # fmt: skip


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_by_layer_and_part(saved, tmp_path, tokens, change, message, low_cpu_mem_usage):
    damaged(saved[0], tmp_path, change)
    with pytest.raises(IncompleteAdapterError, match=message):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("change", [DAMAGES["without-U0"][0], DAMAGES["without-a-layer"][0]], ids=["part", "layer"])
def test_a_refused_second_adapter_is_never_used_half_loaded(saved, tmp_path, tokens, change):
    damaged(saved[0], tmp_path, change)
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

    damaged(saved[0], tmp_path, DAMAGES["without-U0"][0])
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
    damaged(saved[0], tmp_path, lambda tensors: {n.replace("sorsa_factors", "lora_A"): t for n, t in tensors.items()})
    with pytest.raises((FactorsNotLoadedError, IncompleteAdapterError)):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)(tokens)


def test_another_rank_in_the_config_than_in_the_file_is_an_error(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(IncompleteAdapterError, match=r"dU has shape \(32, 3\).*expected \(32, 4\).*rank"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


# -- names with wrappers in them -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        renamed("base_model.model.", "base_model.model._orig_mod."),
        renamed(".mlp.", "._orig_mod._checkpoint_wrapped_module.mlp."),
        renamed(".sorsa_factors", ".base_layer.sorsa_factors"),
    ],
    ids=["compiled", "compiled-blocks", "inside-another-method"],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_file_whose_names_carry_only_wrappers_is_loaded(saved, tmp_path, tokens, change, low_cpu_mem_usage):
    damaged(saved[0], tmp_path, change)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(tokens).logits, saved[1])
    loaded.load_adapter(tmp_path, "default")  # again, as resuming does
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    assert torch.equal(loaded(tokens).logits, saved[1])


def test_a_file_of_a_compiled_base_loads_onto_the_plain_one_and_the_other_way_round(saved, tmp_path, tokens):
    compiled = PeftModel.from_pretrained(torch.compile(tiny_llama(), backend="eager"), saved[0])
    compiled.save_pretrained(tmp_path / "compiled")
    assert all("._orig_mod." in name for name in load_file(tmp_path / "compiled" / FILE))
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "compiled")
    assert torch.equal(plain(tokens).logits, saved[1])
    with pytest.raises(IncompleteAdapterError, match=r"from a compiled or wrapped model.*_orig_mod.*save it again"):
        export_lora(tmp_path / "compiled", tmp_path / "lora")
    plain.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / FILE).read_bytes() == (saved[0] / FILE).read_bytes()


def test_layouts_of_a_wrapped_model_are_those_of_the_plain_one():
    layouts = {
        "_orig_mod.model.experts": ["parameter", "_orig_mod.model.experts.down_proj"],
        "conv": ["convolution", 3],
    }
    plain = {"model.experts": ["parameter", "model.experts.down_proj"], "conv": ["convolution", 3]}
    assert plain_layouts(layouts) == plain


def test_names_with_wrappers_that_could_be_of_two_adapters_are_refused_for_that_reason(saved, tmp_path):
    if Version(peft_version) < Version("0.21"):
        pytest.skip("this PEFT puts the adapter's name into the file's names, so that there is no doubt")
    damaged(saved[0], tmp_path, renamed("base_model.model.", "base_model.model._orig_mod."))
    model = PeftModel.from_pretrained(tiny_llama(), saved[0])
    model.load_adapter(saved[0], "second")
    with pytest.raises(IncompleteAdapterError, match="names carry wrappers, such as _orig_mod"):
        model.load_adapter(tmp_path, "second")


def test_wrappers_do_not_hide_another_models_layers(saved, tmp_path):
    damaged(saved[0], tmp_path, renamed(r"q_proj", "_orig_mod.z_proj"))
    with pytest.raises(IncompleteAdapterError, match="for 2 layers that do not have the adapter"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


# -- whether the factors are those of the base weight ----------------------------------------------------------------

UP = "base_model.model.model.layers.1.mlp.up_proj.sorsa_factors."
GATE = "base_model.model.model.layers.1.mlp.gate_proj.sorsa_factors."  # of the same shape


def changed(part, function):
    return lambda tensors: {**tensors, UP + part: function(tensors[UP + part])}


def other_layers_factors(tensors):
    return {**tensors, **{UP + part: tensors[GATE + part].clone() for part in ("U0", "S0", "V0")}}


EDITS = {
    "another-fingerprint": (changed("fingerprint", lambda f: f * 1.01), BaseMismatchError, r"up_proj differs by 0\.01"),
    "tripled-U0": (
        changed("U0", lambda U: 3 * U),
        IncompleteAdapterError,
        r"U0 of .*1\.mlp\.up_proj is not orthonormal",
    ),
    "one-V0-column-twice": (
        changed("V0", lambda V: V[:, [0, 0, 2]]),
        IncompleteAdapterError,
        r"V0 of .*1\.mlp\.up_proj is not",
    ),
    "negated-S0": (changed("S0", lambda S: -S), IncompleteAdapterError, r"up_proj are no singular triplets"),
    "scaled-S0": (changed("S0", lambda S: 1.01 * S), IncompleteAdapterError, r"up_proj are no singular triplets"),
    "other-order": (
        changed("U0", lambda U: U.flip(1).contiguous()),
        IncompleteAdapterError,
        r"up_proj are no singular triplets",
    ),
    "another-layers": (other_layers_factors, IncompleteAdapterError, r"up_proj are no singular triplets"),
    **{
        f"{part}-{dtype}".replace("torch.", ""): (
            changed(part, lambda tensor, dtype=dtype: tensor.to(dtype)),
            IncompleteAdapterError,
            rf"up_proj\S*{part} is stored as {str(dtype).removeprefix('torch.')} .*expected float32",
        )
        for part in ("dU", "S0")
        for dtype in (torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn)
    },
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("change", "error", "message"), EDITS.values(), ids=EDITS)
def test_factors_that_are_not_the_base_weights_are_refused_and_change_nothing(
    saved, tmp_path, tokens, change, error, message, low_cpu_mem_usage
):
    damaged(saved[0], tmp_path, change)
    model = trained(seed=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        model.load_adapter(tmp_path, adapter_name="default", low_cpu_mem_usage=low_cpu_mem_usage)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_that_was_cast_is_loaded_onto_its_base_in_any_dtype(saved, tmp_path, dtype, base):
    damaged(saved[0], tmp_path, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    loaded = PeftModel.from_pretrained(tiny_llama(base), tmp_path)
    assert all(layer.factors("default").base_checked for layer in sorsa_layers(loaded))


def test_a_state_dict_with_the_base_weights_is_compared_with_those(saved):
    source = trained(seed=5)
    model = get_peft_model(tiny_llama(seed=1), SORSAConfig(r=3, target_modules="all-linear"))
    model.load_state_dict(source.state_dict())
    assert all(layer.factors("default").base_checked for layer in sorsa_layers(model))


def test_random_factors_of_tests_are_no_triplets_and_load(tmp_path):
    config = SORSAConfig(r=3, target_modules="all-linear", init_weights=False)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_llama(), tmp_path)
