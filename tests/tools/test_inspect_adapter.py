"""What `sorsa inspect` says of an adapter is what its tensors are, computed here in float64 from the model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from builders.adapters import perturb, refuse_to_factorise
from builders.llama import tiny_llama
from builders.models import tiny_mixtral
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_plugin import SORSAConfig, save_adapter
from sorsa_plugin.errors import ForeignAdapterError, IncompleteAdapterError
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_plugin.linalg.fingerprint import fingerprint
from sorsa_plugin.tools.inspect_adapter import inspect_adapter

FILE = "adapter_model.safetensors"


OPTIONS = {"r": 3, "target_modules": "all-linear", "rank_pattern": {"q_proj": 5}, "modules_to_save": ["lm_head"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    model = get_peft_model(tiny_llama(), SORSAConfig(**OPTIONS, gamma=0.25, reg_update="decoupled"))
    perturb(model)
    model.save_pretrained(directory)
    return directory, model


def test_every_number_is_that_of_the_tensors(saved, monkeypatch):
    refuse_to_factorise(monkeypatch)
    summary = inspect_adapter(saved[0])
    layers = {layer.name: layer for layer in sorsa_layers(saved[1])}
    assert [layer.name for layer in summary.layers] == sorted(layers)
    for found in summary.layers:
        layer = layers[found.name]
        factors = layer.factors("default")
        U, S, V = (part.detach().double() for part in factors.get())
        identity = torch.eye(factors.rank, dtype=torch.float64)
        change = layer.get_delta_weight("default").detach().double()
        S0 = factors.S0.double()
        assert (found.out_features, found.in_features) == tuple(layer.base_matrix().shape)
        assert found.rank == factors.rank == (5 if "q_proj" in found.name else 3)
        expected = {
            "gap_U": (U.T @ U - identity).norm(),
            "gap_V": (V.T @ V - identity).norm(),
            "S_min": S.min(),
            "S_max": S.max(),
            "relative_dS": factors.dS.detach().double().norm() / S0.norm(),
            "change": change.norm(),
            "relative_change": change.norm() / S0.norm(),
            "fingerprint": fingerprint(layer.base_matrix()).norm(),
        }
        for name, value in expected.items():  # fp32 sums of at most 48 terms of moderate size: far below 1e-5
            assert getattr(found, name) == pytest.approx(float(value), rel=1e-5), (found.name, name)
        assert found.finite
    assert summary.trainable == sum(
        p.numel() for name, p in saved[1].named_parameters() if p.requires_grad and "sorsa" in name
    )
    assert summary.carried == ("base_model.model.lm_head.weight",)
    assert summary.bytes == (saved[0] / FILE).stat().st_size
    assert summary.dtypes == ("float32",)


def test_a_stack_of_experts_is_one_layer_with_its_largest_gap_and_norms_over_all(tmp_path):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(
        tiny_mixtral(layers=1, experts=3), SORSAConfig(r=2, target_modules=[], target_parameters=names)
    )
    perturb(model)
    model.save_pretrained(tmp_path)
    summary = inspect_adapter(tmp_path)
    layers = {layer.name: layer for layer in sorsa_layers(model)}
    assert {layer.name for layer in summary.layers} == set(layers) == {f"model.layers.0.{name}" for name in names}
    for found in summary.layers:
        layer = layers[found.name]
        U, S, V = (part.detach().double() for part in layer.get_factors())
        eye, S0 = torch.eye(2, dtype=torch.float64), layer.factors("default").S0.double()
        assert (found.matrices, found.out_features, found.in_features) == tuple(layer.base_matrix().shape)
        assert found.gap_U == pytest.approx(max(float((P.T @ P - eye).norm()) for P in U), rel=1e-5)
        assert found.gap_V == pytest.approx(max(float((P.T @ P - eye).norm()) for P in V), rel=1e-5)
        assert (found.S_min, found.S_max) == pytest.approx((float(S.min()), float(S.max())), rel=1e-5)
        change = layer.get_delta_weight("default").detach().double().norm()
        assert (found.change, found.relative_change) == pytest.approx(
            (float(change), float(change / S0.norm())), rel=1e-5
        )
        assert found.relative_dS == pytest.approx(float((S - S0).norm() / S0.norm()), rel=1e-5)
        assert found.fingerprint == pytest.approx(float(fingerprint(layer.base_matrix()).norm()), rel=1e-5)
    run = CliRunner().invoke(build_app(), ["inspect", str(tmp_path)])
    assert "3 x 96 x 32" in run.output
    with torch.no_grad():
        next(iter(layers.values())).factors("default").dU[1, 0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    assert sum(not layer.finite for layer in inspect_adapter(tmp_path).layers) == 1


def test_attentions_tied_layers_and_trained_tokens_are_listed_by_their_names_in_the_base(tmp_path):
    base = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    get_peft_model(base, SORSAConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path / "attention")
    shapes = {
        x.name: (x.matrices, x.out_features, x.in_features) for x in inspect_adapter(tmp_path / "attention").layers
    }
    assert shapes == {"0": (1, 24, 8), "0.out_proj": (1, 8, 8)}

    base = tiny_llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    config = SORSAConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=True)
    get_peft_model(base, config).save_pretrained(tmp_path / "tied")
    assert [(x.name, x.out_features, x.in_features) for x in inspect_adapter(tmp_path / "tied").layers] == [
        ("model.embed_tokens", 32, 64)
    ]
    run = CliRunner().invoke(build_app(), ["inspect", str(tmp_path / "tied")])
    assert "lm_head to model.embed_tokens" in run.output

    tokens = {"embed_tokens": [3, 7], "lm_head": [5]}
    config = SORSAConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "tokens")
    summary = inspect_adapter(tmp_path / "tokens")
    assert summary.trained_tokens == {"model.embed_tokens": 2, "lm_head": 1}
    assert summary.carried == ()
    run = CliRunner().invoke(build_app(), ["inspect", str(tmp_path / "tokens")])
    assert "2 rows of model.embed_tokens" in run.output


def test_an_untrained_adapter_has_no_change_and_no_gap(tmp_path):
    get_peft_model(tiny_llama(), SORSAConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path)
    for layer in inspect_adapter(tmp_path).layers:
        assert layer.change == layer.relative_dS == 0
        assert max(layer.gap_U, layer.gap_V) <= 1e-5 * 3**0.5  # what the factorisation promises


def test_the_dtype_of_a_16_bit_file_is_named(saved, tmp_path):
    save_adapter(saved[1], tmp_path, dtype="bfloat16")
    summary = inspect_adapter(tmp_path)
    assert summary.dtypes == ("bfloat16",)
    # rounded factors are the ones that are loaded, so their gap is real: of the order of bf16's roundoff
    assert all(layer.finite for layer in summary.layers)


def test_a_base_of_several_dtypes_is_described_by_all_of_them(tmp_path):
    base = tiny_llama(torch.bfloat16)
    base.model.layers[1].float()
    get_peft_model(base, SORSAConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    run = CliRunner().invoke(build_app(), ["inspect", str(tmp_path)])
    assert "stored as bfloat16 and float32" in " ".join(run.output.split())


def test_damaged_and_foreign_adapters_are_named(saved, tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ForeignAdapterError, match="peft_type 'LORA'"):
        inspect_adapter(tmp_path / "lora")
    shutil.copytree(saved[0], tmp_path / "half")
    (tmp_path / "half" / FILE).write_bytes((saved[0] / FILE).read_bytes()[:5000])
    with pytest.raises(IncompleteAdapterError, match="cannot be read"):
        inspect_adapter(tmp_path / "half")
    run = CliRunner().invoke(build_app(), ["inspect", str(tmp_path)])
    assert run.exit_code == 1
    assert "holds no adapter_config.json" in run.output
    assert "Its adapters are in half, lora" in run.output


def edited(saved, directory, **options):
    shutil.copytree(saved[0], directory)
    config = directory / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    return inspect_adapter(directory)


@pytest.mark.parametrize(
    ("option", "value"), [("task_type", "NONE"), ("exclude_modules", "(["), ("rank_pattern", "q_proj=4"), ("r", 0)]
)
def test_an_option_in_the_file_that_cannot_be_honoured_is_named_with_the_file(saved, tmp_path, option, value):
    with pytest.raises(IncompleteAdapterError, match=r"edited.adapter_config\.json cannot be read as an adapter"):
        edited(saved, tmp_path / "edited", **{option: value})


def test_layouts_that_are_null_in_the_file_are_none(saved, tmp_path):
    summary = edited(saved, tmp_path / "edited", lora_layouts=None)
    assert summary.layers == inspect_adapter(saved[0]).layers
