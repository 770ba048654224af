"""Exported adapters of every kind that LoRA has too: plain PEFT computes the same with them, in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.adapted_kinds import adapted, layers_of
from builders.adapters import perturb
from builders.layer_kinds import KINDS, make_model, sample
from peft import PeftModel, convert_to_lora, get_peft_model, save_as_lora
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sorsa_plugin import SORSAConfig, export_lora
from sorsa_plugin.errors import UnsupportedLayerError

EXPORTED = [name for name, kind in KINDS.items() if kind.exported]
PLAIN_PEFT = """
import sys, warnings
sys.modules["sorsa_plugin"] = None
sys.path.insert(0, sys.argv[2])
import torch
from pathlib import Path
from peft import PeftModel
from builders.layer_kinds import make_model, sample
for directory in Path(sys.argv[1]).iterdir():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(make_model(directory.name), directory / "lora").eval()
    with torch.no_grad():
        y = model(sample(directory.name))
    torch.save({"y": y, "warnings": [str(w.message) for w in caught]}, directory / "found.pt")
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """{kind: output of SORSA, output of the LoRA in plain PEFT, report}"""
    root = tmp_path_factory.mktemp("kinds")
    results = {}
    for name in EXPORTED:
        model = adapted(name)
        perturb(model)
        model.save_pretrained(root / name / "sorsa")
        report = export_lora(root / name / "sorsa", root / name / "lora")
        with torch.no_grad():
            results[name] = {"sorsa": model(sample(name)), "report": report, "layers": len(layers_of(model))}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    here = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-I", "-c", PLAIN_PEFT, str(root), here], check=True, timeout=300, env=environment)
    for name, result in results.items():
        result.update(torch.load(root / name / "found.pt"))
    return results


@pytest.mark.parametrize("name", EXPORTED)
def test_plain_peft_gives_the_same_output(served, name):
    result = served[name]
    with torch.no_grad():
        plain = make_model(name)(sample(name))
    effect = (result["sorsa"] - plain).abs().max()
    # fp32 sums in another order: a few 2^-24 of outputs of order 1 to 10; a lost or misplaced column is an effect
    error = (result["y"] - result["sorsa"]).abs().max()
    assert error <= 1e-6 * max(1.0, float(plain.abs().max()))
    assert error < 1e-3 * effect


@pytest.mark.parametrize("name", EXPORTED)
def test_plain_peft_finds_nothing_missing(served, name):
    assert not [text for text in served[name]["warnings"] if "missing" in text.lower() or "unexpected" in text.lower()]
    assert len(served[name]["report"].layers) == served[name]["layers"]


@pytest.mark.parametrize("name", [name for name in KINDS if name not in EXPORTED])
def test_what_lora_computes_otherwise_is_refused_and_nothing_is_written(name, tmp_path, refused):
    model = adapted(name)
    model.save_pretrained(tmp_path / "sorsa")
    with refused(UnsupportedLayerError, r"inner is .*merge_and_unload"):
        export_lora(tmp_path / "sorsa", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("name", ["linear", "transformers Conv1D"])
@torch.no_grad()
def test_what_peft_itself_converts_to_lora_computes_the_same(name, tmp_path):
    model = adapted(name)
    perturb(model)
    expected = model(sample(name))
    save_as_lora(tmp_path, model, rank=4)  # 2r: exact
    found = PeftModel.from_pretrained(make_model(name), tmp_path).eval()(sample(name))
    # fp32 sums of 8 terms, and of a decomposition; without the change 0.1 or more
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected - make_model(name)(sample(name))).abs().max() > 1e-2


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("linear", "transformers Conv1D")])
def test_peft_refuses_to_convert_layers_that_it_would_take_for_linear_ones(name):
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapted(name), rank=4)


@pytest.mark.parametrize("name", ["experts", "conv2d", "embedding"])
@torch.no_grad()
def test_a_truncated_export_is_the_nearest_lora_of_that_rank(name, tmp_path):
    """Per layer and expert, the error is the norm of the change's smaller singular values (Eckart-Young)."""
    model = adapted(name)
    perturb(model, scale=0.5)
    model.save_pretrained(tmp_path / "sorsa")
    report = export_lora(tmp_path / "sorsa", tmp_path / "lora", rank=1)
    modules = dict(model.base_model.model.named_modules())
    assert len(report.layers) == len(layers_of(model))
    for exported in report.layers:
        L, R = modules[exported.name].factors("default").low_rank_pair()
        values = torch.linalg.svdvals((L @ R.mT).double())
        expected = values[..., 1:].norm() / values.norm()
        assert exported.relative_error == pytest.approx(float(expected), rel=1e-4)


@torch.no_grad()
def test_a_tied_output_layer_is_exported_with_the_embedding(tmp_path):
    options = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, tie_word_embeddings=True, **options)).eval()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, SORSAConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True))
    perturb(model)
    tokens = torch.arange(1, 9)[None]
    logits = model(tokens).logits
    model.save_pretrained(tmp_path / "sorsa")
    export_lora(tmp_path / "sorsa", tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.lora_A.weight" in tensors
    assert not model.base_model.model.lm_head.supports_lora_conversion()  # by PEFT, which knows nothing of it
    lora = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    torch.testing.assert_close(lora(tokens).logits, logits, rtol=0, atol=1e-6)  # logits of order 1, fp32


@torch.no_grad()
def test_trained_tokens_are_carried(tmp_path):
    base = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))
    model = get_peft_model(base, SORSAConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [3]}))
    model.save_pretrained(tmp_path / "sorsa")
    assert export_lora(tmp_path / "sorsa", tmp_path / "lora").carried
