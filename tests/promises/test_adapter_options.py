"""What a PEFT user does with LoRA's options and with several adapters: it works here, or is refused in words."""

from __future__ import annotations

import copy

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tied_llama, tiny_llama
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import BaseMismatchError
from sorsa_plugin.layers.layer import sorsa_layers

ATOL = 2e-6
"""fp32 logits of order 1 or less after two layers of sums over at most 48 terms, in two orders."""


def names(model: torch.nn.Module) -> set[str]:
    return {layer.name for layer in sorsa_layers(model)}


# -- which modules ---------------------------------------------------------------------------------------------------


def test_a_regular_expression_selects_modules():
    model = get_peft_model(
        tiny_llama(), SORSAConfig(r=2, target_modules=r".*layers\.1\..*_(proj)", exclude_modules=r".*mlp.*")
    )
    assert names(model) == {f"model.layers.1.self_attn.{part}_proj" for part in "qkvo"}


@torch.no_grad()
def test_the_output_layer_is_adapted_where_it_is_named(tokens):
    base = tiny_llama()
    expected = base(tokens).logits
    model = get_peft_model(base, SORSAConfig(r=2, target_modules=["lm_head"]))
    assert names(model) == {"lm_head"}
    assert torch.equal(model(tokens).logits, expected)


# -- trained beside the adapter --------------------------------------------------------------------------------------


def train(model: PeftModel, tokens: torch.Tensor, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [3, 5]},
        {"trainable_token_indices": {"embed_tokens": [3, 5]}, "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
        {"target_modules": r".*(q_proj|embed_tokens)", "ensure_weight_tying": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [tiny_llama, tied_llama])
@pytest.mark.filterwarnings("ignore:(You have requested|Model with|Input and output|Setting|ensure_weight)")
def test_what_is_trained_beside_or_tied_is_saved_loaded_and_merged(make, options, tokens, tmp_path):
    model = get_peft_model(make(), SORSAConfig(r=2, **{"target_modules": ["q_proj"], **options}))
    tokens = torch.cat([tokens, torch.tensor([[3, 5, 3, 5, 3, 5, 3, 5, 3]])])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, make()(tokens).logits)
    train(model, tokens)
    with torch.no_grad():
        logits = model(tokens).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
        assert torch.equal(loaded(tokens).logits, logits)
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, make()(tokens).logits)
        torch.testing.assert_close(model.merge_and_unload()(tokens).logits, logits, rtol=0, atol=10 * ATOL)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
@pytest.mark.filterwarnings("ignore:(Model with|Input and output)")
@torch.no_grad()
def test_without_tying_peft_warns_and_merging_unties(targets, tokens):
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
        model = get_peft_model(tied_llama(), SORSAConfig(r=2, target_modules=targets))
    perturb(model)
    logits = model(tokens).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, logits, rtol=0, atol=ATOL)
    assert not merged.config.tie_word_embeddings


# -- several adapters ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_several_active_adapters_add_up_on_and_off_shared_layers(tokens):
    """The change of each layer is the sum of its adapters' changes: compared with merging them into a plain model."""
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj", "up_proj"])).eval()
    model.add_adapter("second", SORSAConfig(r=3, target_modules=["up_proj", "lm_head"]))
    perturb(model), perturb(model, "second", seed=4)
    model.base_model.set_adapter(["default", "second"])
    logits, plain = model(tokens).logits, tiny_llama()
    for layer in sorsa_layers(model):
        weight = plain.get_submodule(layer.name).weight
        weight += sum(layer.get_delta_weight(name) for name in layer.sorsa_factors)
    torch.testing.assert_close(logits, plain(tokens).logits, rtol=0, atol=ATOL)


@torch.no_grad()
def test_loading_into_an_adapters_name_swaps_it(tmp_path, tokens):
    """Hot-swapping for equal shapes: checked against the base like any loading."""
    outputs = []
    for seed in (1, 2):
        model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj"])).eval()
        perturb(model, seed=seed)
        model.save_pretrained(tmp_path / str(seed))
        outputs.append(model(tokens).logits)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "1")
    for seed in (2, 1, 2):
        model.load_adapter(tmp_path / str(seed), "default")
        assert torch.equal(model(tokens).logits, outputs[seed - 1])
    other = get_peft_model(tiny_llama(seed=3), SORSAConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError):
        model.load_adapter(tmp_path / "other", "default")


@torch.no_grad()
def test_merged_sorsa_is_a_base_for_lora(tokens, tmp_path):
    """SORSA first, LoRA after: the LoRA starts from the merged function and trains on top of it."""
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules="all-linear")).eval()
    perturb(model)
    logits = model(tokens).logits
    merged = model.merge_and_unload()
    assert not hasattr(merged, "peft_config")
    base = copy.deepcopy(merged)
    lora = get_peft_model(merged, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.testing.assert_close(lora(tokens).logits, logits, rtol=0, atol=ATOL)
    with torch.enable_grad():
        train(lora, tokens)
    assert (lora(tokens).logits - logits).abs().max() > 1e-2
    lora.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(tokens).logits, lora(tokens).logits)


# -- refused in words ------------------------------------------------------------------------------------------------


def test_mixing_methods_in_one_model_is_refused_by_peft(refused):
    with refused(ValueError, "'SORSA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj"]), mixed=True)
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    assert isinstance(model, PeftMixedModel)
    with refused(ValueError, "'SORSA' is not compatible with the `PeftMixedModel`"):
        model.add_adapter("second", SORSAConfig(r=2, target_modules=["q_proj"]))


def test_a_weighted_combination_is_refused_with_the_ways_out(refused):
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj"]))
    with refused(NotImplementedError, r"set_adapter\(\[...\]\), or export them with export_lora"):
        model.add_weighted_adapter(["default"], [0.5], "half")


def test_hot_swapping_by_pefts_helper_is_refused_by_peft(tmp_path, refused):
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with refused(ValueError, "Hotswapping only supports LORA but SORSA was passed"):
        hotswap_adapter(model, str(tmp_path), "default")


@pytest.mark.parametrize(
    "options", [{"layer_replication": [[0, 1]]}, {"bias": "all"}, {"use_dora": True}, {"use_qalora": True}], ids=str
)
def test_options_that_lora_has_and_the_method_has_not_are_refused_by_name(options, refused):
    (name,) = options
    with refused(TypeError, rf"cannot honour 1 of LoraConfig's options. {name}=.*: .*(Delete|Repeat)"):
        SORSAConfig(**options)
