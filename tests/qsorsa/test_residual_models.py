"""Whole models on quantised residuals: made from a config, saved, moved, exported and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import assert_same_tensors, perturb
from builders.one_layer import inputs, only_layer
from builders.quantised import (
    CONFIGS,
    IN,
    OUT,
    base_tensors,
    load_llama,
    quantised_base,
    save_llama,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from sorsa_plugin import SORSAConfig, export_lora, merge_adapter, merge_and_dequantize, quantize_residual, save_residual
from sorsa_plugin.errors import BaseFilesError, BaseMismatchError, FoldError, OutputExistsError
from sorsa_plugin.layers.layer import sorsa_layers

pytest.importorskip("bitsandbytes")


def plain_weight(seed: int = 0) -> torch.Tensor:
    """W of `quantised_linear` before it was quantised."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(OUT, IN, generator=generator) * IN**-0.5


def on_residual(kind: str, seed: int = 0, **options: Any) -> PeftModel:
    config = SORSAConfig(r=4, target_modules=["proj"], svd="exact", **options)
    return quantize_residual(quantised_base(kind, seed), config, {"proj.weight": plain_weight(seed)})


def test_a_refused_deletion_leaves_the_adapter_whole(tmp_path: Path) -> None:
    model = on_residual("nf4")
    with pytest.raises(FoldError, match="there is no W to put back"):
        model.delete_adapter("default")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


# -- whole models ----------------------------------------------------------------------------------------------------


def config(**options: Any) -> SORSAConfig:
    return SORSAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", residual_base=True, **options)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_alone_makes_the_residual_from_the_models_own_checkpoint(
    kind: str, llama: str, tokens: torch.Tensor
) -> None:
    full = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    plain = load_llama(llama, kind).train()
    rounded = plain(tokens).logits
    model = get_peft_model(plain, config()).train()
    assert model.peft_config["default"].full_precision_base == llama
    for layer in sorsa_layers(model):
        W = full.get_submodule(layer.name).weight
        initial = layer.factors("default").initial_matrix()
        best = torch.linalg.svdvals(W.detach())[:4].square().sum()
        assert float(initial.square().sum()) == pytest.approx(float(best), rel=1e-3), layer.name
    exact = full(tokens).logits
    assert (model(tokens).logits - exact).norm() < (rounded - exact).norm()


def test_a_checkpoint_that_moved_is_found_where_the_base_came_from(tokens: torch.Tensor, tmp_path: Path) -> None:
    model = get_peft_model(load_llama(save_llama(tmp_path / "before")), config()).eval()
    perturb(model)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "before").rename(tmp_path / "after")
    moved = PeftModel.from_pretrained(load_llama(str(tmp_path / "after")), tmp_path / "adapter")
    assert torch.equal(moved(tokens).logits, expected)
    with pytest.raises(BaseFilesError, match="gives no model config"):  # what a user names is never replaced
        get_peft_model(load_llama(str(tmp_path / "after")), config(full_precision_base=str(tmp_path / "before")))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_saved_residual_model_and_its_adapter_load_to_the_same_bits(
    kind: str, llama: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = get_peft_model(load_llama(llama, kind), config()).eval()
    untrained = model(tokens).logits
    directory = save_residual(model, tmp_path / "residual")
    assert torch.equal(model(tokens).logits, untrained)
    assert json.loads((directory / "config.json").read_text())["sorsa_residual"] == {"of": llama, "rank": 4}
    base = AutoModelForCausalLM.from_pretrained(directory)
    assert base.is_quantized
    loaded = PeftModel.from_pretrained(base, directory / "adapter", is_trainable=True)
    assert_same_tensors(base_tensors(loaded), base_tensors(model))
    assert torch.equal(loaded.eval()(tokens).logits, untrained)

    perturb(loaded)
    trained = loaded(tokens).logits
    loaded.save_pretrained(tmp_path / "trained")
    assert "The base stores quantised residuals" in (tmp_path / "trained" / "README.md").read_text()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "trained")
    assert torch.equal(again.eval()(tokens).logits, trained)
    # and where the residual model was not kept, from the original checkpoint
    anew = PeftModel.from_pretrained(load_llama(llama, kind), tmp_path / "trained")
    assert torch.equal(anew.eval()(tokens).logits, trained)
    with pytest.raises(OutputExistsError):
        save_residual(model, directory)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("residual", [True, False])
def test_after_wrong_weights_were_refused_the_model_takes_another_adapter(
    residual: bool, llama: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    options = {"r": 4, "target_modules": "all-linear"}
    base, fresh = load_llama(llama), load_llama(llama)
    wrong = SORSAConfig(**options, residual_base=True, full_precision_base=save_llama(tmp_path, seed=1))
    with pytest.raises(BaseMismatchError):
        get_peft_model(base, wrong)
    made, expected = (
        get_peft_model(model, SORSAConfig(**options, residual_base=residual)).train()(tokens).logits
        for model in (base, fresh)
    )
    assert torch.equal(made, expected)


def test_a_wider_second_adapter_makes_the_residuals_that_it_needs(llama: str, tokens: torch.Tensor) -> None:
    options = {"r": 4, "residual_base": True}
    model = get_peft_model(load_llama(llama), SORSAConfig(target_modules=["q_proj"], **options)).train()
    model.add_adapter("wide", SORSAConfig(target_modules=["q_proj", "v_proj"], **options))
    expected = get_peft_model(load_llama(llama), SORSAConfig(target_modules=["q_proj", "v_proj"], **options)).train()
    for name in ("default", "wide"):
        model.set_adapter(name)
        assert torch.equal(model(tokens).logits, expected(tokens).logits)


def test_a_residual_model_takes_no_adapter_but_its_own(llama: str, tmp_path: Path) -> None:
    directory = save_residual(get_peft_model(load_llama(llama), config()), tmp_path / "residual")
    with pytest.raises(FoldError, match=f"the base model that it was made from .{llama}"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(directory), SORSAConfig(r=4))
    with pytest.raises(FoldError, match="stores quantised residuals already"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config())
    intact = get_peft_model(load_llama(llama), SORSAConfig(r=4, task_type="CAUSAL_LM"))
    intact.save_pretrained(tmp_path / "intact")
    with pytest.raises(FoldError, match="stores quantised residuals"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "intact")
    with pytest.raises(FoldError, match="stores no quantised residuals now"):
        save_residual(intact, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_an_adapter_of_a_residual_is_exported_for_the_full_model(
    llama: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """The change is L R^T: on the full-precision base it gives W + L R^T, what merging into that would."""
    model = get_peft_model(load_llama(llama), config())
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert LoraConfig.from_pretrained(tmp_path / "lora").base_model_name_or_path == llama
    full = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    weights = {layer.name: layer.get_delta_weight("default").detach() for layer in sorsa_layers(model)}
    changed = {name: full.get_submodule(name).weight.detach() + change for name, change in weights.items()}
    lora = PeftModel.from_pretrained(full, tmp_path / "lora").merge_and_unload()
    for name, expected in changed.items():
        torch.testing.assert_close(lora.get_submodule(name).weight.data, expected, rtol=1e-4, atol=1e-6)


def test_a_trained_adapter_of_a_residual_goes_on_the_full_model(
    llama: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """There it is an adapter as any other: W + L R^T, with the fingerprint of W checked."""
    model = get_peft_model(load_llama(llama), config())
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    weights = {layer.name: layer.get_delta_weight("default").detach() for layer in sorsa_layers(model)}
    full = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    expected = {name: full.get_submodule(name).weight.detach() + change for name, change in weights.items()}
    loaded = PeftModel.from_pretrained(full, tmp_path / "adapter").eval()
    changed = loaded(tokens).logits
    loaded.save_pretrained(tmp_path / "again")
    merged = loaded.merge_and_unload()
    assert not hasattr(merged.config, "sorsa_residual")
    for name, weight in expected.items():
        assert torch.equal(merged.get_submodule(name).weight, weight), name
    # another order of the same sums in fp32; what a single wrong layer does is some hundred times as much
    torch.testing.assert_close(merged(tokens).logits, changed, rtol=1e-4, atol=1e-4)
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), tmp_path / "again"
    )
    assert torch.equal(again.eval()(tokens).logits, changed)
    anew = PeftModel.from_pretrained(load_llama(llama), tmp_path / "again")
    assert torch.equal(anew.eval()(tokens).logits, model.eval()(tokens).logits)

    report = merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged")
    assert len(report.merged) == len(expected)
    files = AutoModelForCausalLM.from_pretrained(report.output, dtype=torch.float32)
    for name, weight in expected.items():
        assert torch.equal(files.get_submodule(name).weight, weight.bfloat16().float()), name

    other = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "other", seed=1), dtype=torch.float32)
    with pytest.raises(BaseMismatchError, match="was not trained on this base model"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")


def test_merged_a_residual_model_is_ordinary_again(llama: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = get_peft_model(load_llama(llama), config()).train()
    perturb(model)
    with torch.no_grad():
        expected = model(tokens).logits
    plain = merge_and_dequantize(model, torch.float32)
    plain.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not {"sorsa_residual", "quantization_config"} & set(saved)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-3, atol=1e-4)


def test_a_residual_that_no_config_announces_is_recognised(tmp_path: Path) -> None:
    """A model that is no transformers model, its residual kept by its owner: nothing is made again."""
    model, x = on_residual("nf4-double").eval(), inputs(IN)
    perturb(model)
    expected = model(x)
    model.save_pretrained(tmp_path)
    base = quantised_base("nf4-double")
    base.proj.weight = only_layer(model).get_base_layer().weight
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), expected)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_merged_model_no_longer_says_that_its_weights_are_residuals(loaded: bool, llama: str, tmp_path: Path) -> None:
    """Else it would refuse every later adapter, and write a false note into its config.json."""
    model = get_peft_model(load_llama(llama), config())
    if loaded:
        directory = save_residual(model, tmp_path / "residual")
        base = AutoModelForCausalLM.from_pretrained(directory)
        model = PeftModel.from_pretrained(base, directory / "adapter")
    assert model.config.sorsa_residual["rank"] == 4
    merged = model.merge_and_unload()
    assert not hasattr(merged.config, "sorsa_residual")
    assert sorsa_layers(get_peft_model(merged, SORSAConfig(r=2, target_modules=["q_proj"])))
