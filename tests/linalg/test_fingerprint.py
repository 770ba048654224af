"""The base model is recognised by W p: the same base passes, another is refused, a change of storage is understood."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import BaseMismatchError
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_plugin.linalg.fingerprint import _say_once, check, fingerprint, probe, storage_of

BF16, FP32 = torch.bfloat16, torch.float32


def random_matrix(out: int = 24, inner: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, inner, generator=torch.Generator().manual_seed(seed))


def saved_adapter(directory, base=None):
    """An adapter of a tiny Llama, moved away from init, saved; returns the model."""
    model = get_peft_model(tiny_llama() if base is None else base, SORSAConfig(r=3, target_modules="all-linear"))
    perturb(model)
    model.save_pretrained(directory)
    return model.eval()


def test_the_probe_is_fixed_balanced_and_the_same_in_every_process():
    expected = [1.0 if (k * 2654435761) % 2**32 >= 2**31 else -1.0 for k in range(1, 301)]
    assert probe(300, "cpu").tolist() == expected
    assert abs(sum(expected)) <= 300**0.5


def test_the_fingerprint_is_the_matvec_in_fp32():
    W = random_matrix()
    expected = W.double() @ probe(40, "cpu").double()
    # an inner product of n terms errs by at most n u sum |w|
    assert ((fingerprint(W).double() - expected).abs() <= 40 * 2.0**-24 * W.double().abs().sum(1)).all()
    assert fingerprint(W.to(BF16)).dtype == FP32


def test_the_layer_stores_the_fingerprint_of_its_own_weight():
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for layer in sorsa_layers(model):
        assert torch.equal(layer.factors("default").fingerprint, fingerprint(layer.base_matrix()))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), storage=st.sampled_from(["float32", "bfloat16", "float16", "nf4", None]))
def test_a_weight_matches_its_own_fingerprint_and_no_other_weight_matches(seed, storage):
    W, other = random_matrix(seed=seed), random_matrix(seed=seed + 1)
    check(fingerprint(W), W, storage, "float32", "here")
    with pytest.raises(BaseMismatchError, match="fingerprint of here differs by"):
        check(fingerprint(other), W, storage, "float32", "here")


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("made_in_16_bits", [False, True])
def test_rounding_the_base_to_16_bits_is_expected_and_silent(dtype, made_in_16_bits, caplog):
    W = random_matrix(256, 256)
    low = str(dtype).removeprefix("torch.")
    trained, now = (W.to(dtype), W) if made_in_16_bits else (W, W.to(dtype))
    kinds = (low, "float32") if made_in_16_bits else ("float32", low)
    with caplog.at_level(logging.WARNING):
        check(fingerprint(trained), now, *kinds, "here")
    assert not caplog.records


def test_more_than_rounding_with_another_storage_is_a_warning_that_names_the_layer(caplog):
    W = random_matrix()
    with caplog.at_level(logging.WARNING):
        check(fingerprint(W * 1.1), W.to(BF16), "float32", "bfloat16", "layers.0.q_proj")
    assert "fingerprint of layers.0.q_proj differs by 0.1" in caplog.text


@pytest.mark.parametrize(("relative", "accepted"), [(1e-6, True), (1e-3, False), (1e-2, False)])
def test_with_the_same_storage_a_fine_tuned_base_is_refused(relative, accepted):
    W = random_matrix(128, 128)
    tuned = W + relative * random_matrix(128, 128, seed=1)
    if accepted:
        check(fingerprint(W), tuned, "float32", "float32", "here")
    else:
        with pytest.raises(BaseMismatchError):
            check(fingerprint(W), tuned, "float32", "float32", "here")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fingerprint_that_mixed_precision_rounded_is_still_the_weights_own(dtype):
    weight, other = (torch.randn(64, 48, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    check(fingerprint(weight).to(dtype), weight, "float32", "float32", "layer")
    with pytest.raises(BaseMismatchError):
        check(fingerprint(other).to(dtype), weight, "float32", "float32", "layer")


FORMATS = {
    "fp32": [FP32],
    "fp16": [torch.float16],
    "bf16": [BF16],
    "fp16 to bf16": [torch.float16, BF16],
    "bf16 to fp16": [BF16, torch.float16],
}


def through(W: torch.Tensor, path: list[torch.dtype]) -> torch.Tensor:
    for dtype in path:
        W = W.to(dtype)
    return W


def weights_of_several_kinds() -> list[torch.Tensor]:
    """Small and wide, large and tiny numbers, rows of different norms, one large direction."""
    shapes, scales = [(32, 32), (8, 16), (64, 256), (512, 128)], [1.0, 0.02, 1e-4]
    found = []
    for seed in range(20):
        W = random_matrix(*shapes[seed % 4], seed=seed)
        if seed % 3 == 1:
            W = W * random_matrix(len(W), 1, seed=100).exp()
        elif seed % 3 == 2:
            W = W + 3 * random_matrix(len(W), 1, seed=101) @ random_matrix(1, W.shape[1], seed=102)
        found.append(W * scales[seed % 3])
    return found


@pytest.mark.parametrize("file", [FP32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("now", FORMATS)
@pytest.mark.parametrize("then", FORMATS)
def test_what_rounding_of_file_and_base_explains_is_the_same_base_and_another_is_not(then, now, file, caplog):
    weights = weights_of_several_kinds()
    for W, other in zip(weights, [*weights[12:], *weights[:12]], strict=True):
        trained, here = through(W, FORMATS[then]), through(W, FORMATS[now])
        storages = (storage_of(trained), storage_of(here))
        saved = fingerprint(trained).to(file).float()  # whoever made it fp32 again
        with caplog.at_level(logging.WARNING):
            check(saved, here, *storages, "here")
        if W.shape == other.shape:
            with pytest.raises(BaseMismatchError):
                check(saved, through(other, FORMATS[now]), *storages, "here")
    assert "more than the rounding" not in caplog.text


def test_a_base_within_rounding_of_a_cast_file_is_said_in_one_line_for_all_layers(caplog):
    _say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for W in weights_of_several_kinds():
            check(fingerprint(W).to(BF16).float(), W, "float32", "float32", "here")
    (record,) = caplog.records
    assert "rounding to bfloat16 explains" in record.getMessage()


def test_the_mean_of_clients_that_cast_their_files_keeps_the_rounding_in_mind():
    W = random_matrix(64, 64)
    cast = fingerprint(W).half().float()
    shares = [1 / 7, 2 / 7, 4 / 7]
    mean = sum(cast * share for share in shares)
    assert not torch.equal(mean, cast)
    check(mean, W, "float32", "float32", "here")


@pytest.mark.parametrize(("file", "change"), [(FP32, 1e-3), (torch.float16, 3e-3), (BF16, 0.02)], ids=str)
def test_more_than_the_files_rounding_is_another_base(file, change):
    W = random_matrix(128, 128)
    tuned = W + change * random_matrix(128, 128, seed=1)
    with pytest.raises(BaseMismatchError):
        check(fingerprint(W).to(file), tuned, "float32", "float32", "here")


def test_four_bits_of_small_layers_are_within_what_their_rounding_explains(caplog):
    """Rounding to 15 levels by blocks of 64, as nf4 and int4 do: 0.24 of a fingerprint of 32 numbers."""
    with caplog.at_level(logging.WARNING):
        for seed in range(50):
            W = random_matrix(32, 64, seed=seed)
            step = W.abs().amax(1, keepdim=True) / 7
            check(fingerprint((W / step).round() * step), W.to(BF16), "4bit-nf4-64", "bfloat16", "here")
    assert not caplog.records


def test_a_nan_in_the_base_is_a_mismatch():
    W = random_matrix()
    with pytest.raises(BaseMismatchError, match="nan"):
        check(fingerprint(W), W * float("nan"), "float32", "bfloat16", "here")


# -- through PEFT ----------------------------------------------------------------------------------------------------


def test_the_base_an_adapter_was_made_on_is_accepted(tmp_path, tokens):
    saved_adapter(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded(tokens)
    assert all(layer.factors("default").base_checked for layer in sorsa_layers(loaded))


def test_another_base_of_the_same_shape_is_refused_by_name_on_loading(tmp_path):
    saved_adapter(tmp_path)
    with pytest.raises(BaseMismatchError, match=r"model\.layers\.0\.self_attn\.q_proj.*base_model_name_or_path"):
        PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path)


@pytest.mark.parametrize("use", ["forward", "merge", "get_factors"])
def test_another_base_is_refused_at_every_use_where_a_loader_went_around_the_check(use, tmp_path, tokens):
    saved_adapter(tmp_path)
    base = tiny_llama(seed=1)
    base.load_adapter(str(tmp_path))  # transformers sets tensors one by one, without load_state_dict
    layer = sorsa_layers(base)[0]
    uses = {"forward": lambda: base(tokens), "merge": layer.merge, "get_factors": layer.get_factors}
    with pytest.raises(BaseMismatchError, match=r"model\.layers\.0\.self_attn\.q_proj.*base_model_name_or_path"):
        uses[use]()


def test_one_changed_layer_among_many_is_enough_and_is_the_one_named(tmp_path, tokens):
    saved_adapter(tmp_path)
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(BaseMismatchError, match=r"model\.layers\.1\.mlp\.up_proj"):
        PeftModel.from_pretrained(base, tmp_path)(tokens)


def mixed_llama():
    """The first decoder layer in bfloat16, the second in fp32."""
    model = tiny_llama(BF16)
    model.model.layers[1].float()
    return model


@pytest.mark.parametrize("changed", [0, 1])
def test_on_a_base_of_several_dtypes_each_layer_is_recognised_as_closely_as_on_any_other(changed, tmp_path):
    saved_adapter(tmp_path, mixed_llama())
    PeftModel.from_pretrained(mixed_llama(), tmp_path)
    base = mixed_llama()
    with torch.no_grad():  # 2^-6: two units in the last place of bfloat16
        base.model.layers[changed].mlp.up_proj.weight.mul_(1 + 2**-6)
    with pytest.raises(BaseMismatchError, match=rf"model\.layers\.{changed}\.mlp\.up_proj"):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_base_of_several_dtypes_may_be_loaded_in_one(tmp_path, caplog):
    saved_adapter(tmp_path, mixed_llama())
    with caplog.at_level(logging.WARNING, logger="sorsa_plugin"):
        PeftModel.from_pretrained(tiny_llama(BF16), tmp_path)
    assert not [record for record in caplog.records if record.name.startswith("sorsa_plugin")]


def test_an_adapter_that_only_knows_its_base_had_several_dtypes_is_loaded(tmp_path):
    saved_adapter(tmp_path, mixed_llama())
    path = tmp_path / "adapter_config.json"
    options = json.loads(path.read_text())
    assert options["base_storage"]["model.layers.1.mlp.up_proj"] == "float32"
    path.write_text(json.dumps(options | {"base_storage": "mixed"}))
    PeftModel.from_pretrained(mixed_llama(), tmp_path)
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path)


def test_layers_that_are_not_adapted_do_not_count(tmp_path, tokens):
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.mul_(3)
    PeftModel.from_pretrained(base, tmp_path)(tokens)


def test_resized_embeddings_do_not_count(tmp_path, tokens):
    saved_adapter(tmp_path)
    base = tiny_llama()
    base.resize_token_embeddings(80)
    assert PeftModel.from_pretrained(base, tmp_path)(tokens).logits.shape[-1] == 80


def test_an_adapter_trained_on_fp32_runs_on_the_bf16_base_without_a_word(tmp_path, tokens, caplog):
    model = saved_adapter(tmp_path)
    with caplog.at_level(logging.WARNING, logger="sorsa_plugin"):
        loaded = PeftModel.from_pretrained(tiny_llama(BF16), tmp_path)
        logits = loaded(tokens).logits
    assert not [record for record in caplog.records if record.name.startswith("sorsa_plugin")]
    # eight matrix products deep, each rounded to u = 2^-8 relative to its largest values
    exact = model(tokens).logits.detach()
    assert (logits.float() - exact).norm() <= 8 * 2.0**-8 * exact.norm()


def test_weights_on_the_meta_device_are_checked_when_they_arrive(tmp_path):
    model = saved_adapter(tmp_path)
    layer = sorsa_layers(model)[0]
    weight = layer.get_base_layer().weight
    layer.factors("default").base_checked = False
    layer.get_base_layer().weight = torch.nn.Parameter(weight.to("meta"), requires_grad=False)
    layer.check_base("default")
    assert not layer.factors("default").base_checked
    layer.get_base_layer().weight = torch.nn.Parameter(weight * 2, requires_grad=False)
    with pytest.raises(BaseMismatchError):
        layer.check_base("default")
    layer.get_base_layer().weight = weight
    layer.check_base("default")
    assert layer.factors("default").base_checked


def test_loading_a_state_dict_checks_the_base_again(tmp_path, tokens):
    saved = saved_adapter(tmp_path)
    model = get_peft_model(tiny_llama(seed=1), SORSAConfig(r=3, target_modules="all-linear"))
    model(tokens)
    adapter = {key: value for key, value in saved.state_dict().items() if "sorsa_factors" in key}
    with pytest.raises(BaseMismatchError):
        model.load_state_dict(adapter, strict=False)
