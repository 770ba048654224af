"""save_adapter writes what save_pretrained writes, in the dtype asked for."""

from __future__ import annotations

import pytest
import torch
from builders.adapters import trained
from builders.llama import tiny_llama
from builders.saved import FILE, saved_with_outputs
from peft import PeftModel
from safetensors.torch import load_file

from sorsa_plugin import SORSAConfig, save_adapter
from sorsa_plugin.layers.layer import sorsa_layers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directory of a saved adapter, its logits and tensors; tests copy what they damage."""
    return saved_with_outputs(tmp_path_factory.mktemp("saved"))


def adapter_tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".sorsa_factors." in name}


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
