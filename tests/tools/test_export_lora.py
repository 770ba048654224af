"""An exported adapter is an ordinary LoRA: the same function without this package, whole or not at all on disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from builders.adapters import perturb, refuse_to_factorise, trained
from builders.llama import TOKENS, tiny_llama
from builders.models import tiny_deepseek, tiny_gpt2
from builders.one_layer import adapt, make_base
from builders.saved import CONFIG, FILE, saved_adapter
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file, save_file

from sorsa_plugin import SORSAConfig, export_lora, save_adapter
from sorsa_plugin.errors import ForeignAdapterError
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_plugin.linalg.offset_form import Parts
from sorsa_plugin.tools.inspect_adapter import inspect_adapter

U32, U16 = 2.0**-24, 2.0**-11
"""Unit roundoff of fp32 and fp16."""

CASES = {
    "llama-all-linear": (tiny_llama, {"task_type": "CAUSAL_LM"}),
    "biases": (lambda: tiny_llama(attention_bias=True), {"target_modules": r".*\.(q_proj|down_proj)"}),
    "rank-pattern": (tiny_llama, {"rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.up_proj": 1}}),
    "conv1d": (
        lambda: tiny_gpt2(tie_word_embeddings=False),
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "conv1d-and-linear": (
        lambda: tiny_gpt2(tie_word_embeddings=False),
        {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True},
    ),
    "modules-to-save": (
        tiny_llama,
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head", "model.norm"]},
    ),
    "one-layer-only": (tiny_llama, {"target_modules": ["v_proj", "o_proj"], "layers_to_transform": [1]}),
    "excluded": (tiny_llama, {"target_modules": ["v_proj", "o_proj"], "exclude_modules": r".*layers\.0.*"}),
    "rank-above-the-width": (tiny_llama, {"r": 16, "target_modules": ["k_proj"]}),
    "bfloat16-file": (tiny_llama, {}),
}

PLAIN_PEFT = """
import json, sys, warnings
sys.modules["sorsa_plugin"] = None
try:
    import sorsa_plugin
    raise SystemExit("sorsa_plugin is importable")
except ImportError:
    pass
import torch
from pathlib import Path
from peft import PeftModel, PeftType
from transformers import AutoModelForCausalLM
assert "SORSA" not in PeftType.__members__
torch.set_num_threads(1)
root = Path(sys.argv[1])
tokens = torch.load(root / "tokens.pt")
for case in sorted(path for path in root.iterdir() if path.is_dir()):
    base = AutoModelForCausalLM.from_pretrained(case / "base", dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, case / "lora").eval()
    layers = [m for m in model.modules() if "default" in getattr(m, "lora_A", {})]
    with torch.no_grad():
        logits = model(tokens).logits
        with model.disable_adapter():
            plain = model(tokens).logits
    torch.save(
        {"logits": logits, "base": plain, "scales": [m.scaling["default"] for m in layers],
         "warnings": [str(w.message) for w in caught]}, case / "found.pt")
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Every case exported, and what PEFT makes of it in a process that cannot import this package."""
    root = tmp_path_factory.mktemp("served")
    torch.save(TOKENS, root / "tokens.pt")
    results = {}
    for name, (make, options) in CASES.items():
        base = make()
        base.save_pretrained(root / name / "base")
        model = trained(base, **options)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "modules_to_save.default" in key:
                    parameter.mul_(1.5)
        save_adapter(model, root / name / "sorsa", dtype="bfloat16" if name == "bfloat16-file" else "float32")
        if name == "bfloat16-file":
            model = PeftModel.from_pretrained(make(), root / name / "sorsa").eval()
        report = export_lora(root / name / "sorsa", root / name / "lora")
        with torch.no_grad():
            single = model(TOKENS).logits
            double = model.double()(TOKENS).logits
        ranks = [layer.factors("default").rank for layer in sorsa_layers(model)]
        results[name] = {"report": report, "fp32": single, "fp64": double, "ranks": ranks}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-I", "-c", PLAIN_PEFT, str(root)], check=True, timeout=300, env=environment, cwd=root
    )
    for name, result in results.items():
        result.update(torch.load(root / name / "found.pt"), directory=root / name)
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directory of a saved adapter of rank 3 on 14 layers; tests copy what they damage."""
    return saved_adapter(tmp_path_factory.mktemp("saved"))


# -- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_plain_peft_gives_the_same_logits(served, case):
    result = served[case]
    # The LoRA in fp32 is one more way to order and round the sums that SORSA in fp32 makes: the same products of fp32
    # numbers (columns scaled by powers of two), added to the base's output by other kernels. So it lies as far from
    # the float64 result as SORSA itself does, up to a small factor, and 4 allows for the luck of one maximum over
    # 1152 logits. A wrong scale or a lost column changes the logits by a part of the adapter's whole effect.
    rounding = (result["fp32"] - result["fp64"]).abs().max()
    effect = (result["fp64"] - result["base"]).abs().max()
    assert (result["logits"] - result["fp64"]).abs().max() <= 4 * rounding
    assert 4 * rounding < 1e-3 * effect


@pytest.mark.parametrize("case", CASES)
def test_plain_peft_loads_every_layer_at_scale_one_and_finds_nothing_missing(served, case):
    result = served[case]
    assert result["scales"] == [1.0] * len(result["ranks"])
    assert not [text for text in result["warnings"] if re.search("(?i)missing|unexpected|keys", text)]
    if case != "conv1d-and-linear":  # one flag for both kinds: PEFT says that it adjusts it per layer
        assert not [text for text in result["warnings"] if "fan_in_fan_out" in text]


@pytest.mark.parametrize("case", CASES)
def test_the_product_is_the_change_bit_for_bit(served, case):
    directory = served[case]["directory"]
    source, lora = load_file(directory / "sorsa" / FILE), load_file(directory / "lora" / FILE)
    for exported in served[case]["report"].layers:
        prefix = f"base_model.model.{exported.name}"
        # the pair that the layer computes with; that it is U S V^T - U0 S0 V0^T, tests/linalg/test_offset_form.py shows
        L, R = Parts(*(source[f"{prefix}.sorsa_factors.{part}"].float() for part in Parts._fields)).pair()
        A, B = lora[f"{prefix}.lora_A.weight"], lora[f"{prefix}.lora_B.weight"]
        columns, found = B.shape[1], torch.zeros(())
        expected = torch.zeros(())
        for column in range(columns):  # one at a time: no kernel chooses another order of sums
            found = found + torch.outer(B[:, column], A[column])
            expected = expected + (torch.outer(L[:, column], R[:, column]) if column < L.shape[1] else 0)
        assert torch.equal(found, expected)
        assert exported.rank == L.shape[1]
        assert exported.relative_error == 0


def test_an_export_needs_no_base_and_no_decomposition_and_is_the_same_file_each_time(saved, tmp_path, monkeypatch):
    refuse_to_factorise(monkeypatch)
    for name in ("one", "two"):
        export_lora(saved, tmp_path / name)
    for file in (FILE, CONFIG, "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_an_untrained_adapter_is_exported_as_no_change(tmp_path):
    get_peft_model(tiny_llama(), SORSAConfig(r=3, target_modules="all-linear")).save_pretrained(tmp_path / "sorsa")
    for rank in (None, 2):
        report = export_lora(tmp_path / "sorsa", tmp_path / f"lora-{rank}", rank=rank)
        lora = load_file(tmp_path / f"lora-{rank}" / FILE)
        assert report.relative_error == 0
        assert all((lora[n.replace("lora_A", "lora_B")] @ A).norm() == 0 for n, A in lora.items() if "lora_A" in n)


def test_the_pair_survives_rounding_to_fp16_however_small_the_offsets(tmp_path):
    # Rounding both factors errs by at most (2u + u^2) |L| |R|^T elementwise as long as nothing falls below fp16's
    # normal range, 6e-5: there offsets of 1e-6, as a short run leaves them, have lost most of their digits.
    model = adapt(make_base(shape=(64, 48)))
    perturb(model, scale=1e-5)
    model.save_pretrained(tmp_path / "sorsa")
    export_lora(tmp_path / "sorsa", tmp_path / "lora")
    A, B = (load_file(tmp_path / "lora" / FILE)[f"base_model.model.proj.lora_{part}.weight"] for part in "AB")
    exact, rounded = B.double() @ A.double(), B.half().double() @ A.half().double()
    assert (rounded - exact).norm() <= (2 * U16 + U16**2) * (B.double().abs() @ A.double().abs()).norm()


# -- names and layout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_layout_is_what_the_loaders_of_peft_vllm_tgi_and_llama_cpp_read(served, case):
    result, lora = served[case], served[case]["directory"] / "lora"
    assert {path.name for path in lora.iterdir()} == {FILE, CONFIG, "README.md"}
    config = json.loads((lora / CONFIG).read_text())
    rank = 2 * max(result["ranks"])
    assert set(config) == set(LoraConfig().to_dict())
    assert "sorsa" not in json.dumps(config).lower()
    assert (config["peft_type"], config["bias"], config["use_rslora"], config["use_dora"]) == (
        "LORA",
        "none",
        False,
        False,
    )
    assert (config["r"], config["lora_alpha"]) == (rank, rank) == (result["report"].rank,) * 2
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})  # vLLM, TGI and llama.cpp read neither
    assert isinstance(config["target_modules"], list)  # not every server reads a regular expression
    saved = json.loads((lora.parent / "sorsa" / CONFIG).read_text())
    for key in ("modules_to_save", "base_model_name_or_path", "task_type", "fan_in_fan_out", "revision"):
        assert config[key] == saved[key]
    names = load_file(lora / FILE)
    for exported in result["report"].layers:
        A, B = (names.pop(f"base_model.model.{exported.name}.lora_{part}.weight") for part in "AB")
        assert A.shape[0] == B.shape[1] == rank
        assert {A.dtype, B.dtype} == {torch.float32}
    assert tuple(names) == result["report"].carried
    assert (lora / FILE).stat().st_size == result["report"].bytes


def test_modules_to_save_are_copied_verbatim(served):
    directory = served["modules-to-save"]["directory"]
    source, lora = load_file(directory / "sorsa" / FILE), load_file(directory / "lora" / FILE)
    carried = {"base_model.model.lm_head.weight", "base_model.model.model.norm.weight"}
    assert set(served["modules-to-save"]["report"].carried) == carried
    assert all(torch.equal(lora[name], source[name]) for name in carried)


def test_tensors_of_other_dtypes_are_carried_with_their_dtype(tmp_path):
    model = trained(tiny_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "sorsa")
    file = tmp_path / "sorsa" / FILE
    extra = {f"base_model.model.lm_head.{d}": torch.arange(5).to(d) for d in (torch.bfloat16, torch.bool, torch.int64)}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    export_lora(tmp_path / "sorsa", tmp_path / "lora")
    found = load_file(tmp_path / "lora" / FILE)
    content = (tmp_path / "lora" / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in extra.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0  # aligned: it can be mapped
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_an_adapter_of_another_name_is_exported_from_its_own_directory(tmp_path):
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    model.save_pretrained(tmp_path)
    with pytest.raises(ForeignAdapterError, match=r"Its adapters are in mine: give one of these"):
        export_lora(tmp_path, tmp_path / "lora")
    assert export_lora(tmp_path / "mine", tmp_path / "lora").rank == 4


def test_whole_tensors_that_servers_refuse_are_pointed_out(served, tmp_path, caplog):
    export_lora(served["modules-to-save"]["directory"] / "sorsa", tmp_path / "lora")
    assert "carries whole tensors (modules_to_save or embeddings; 2, the first" in caplog.text


# -- whole or not at all ---------------------------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    """A model whose own modules have the name that PEFT gives to what it wraps, and one that begins with it."""

    def __init__(self):
        super().__init__()
        self.base_layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        self.base_layers = torch.nn.ModuleList([torch.nn.Linear(8, 8)])

    def forward(self, x):
        return self.base_layers[0](self.base_layer(x).relu())


def test_a_models_own_base_layer_is_no_wrapper(tmp_path):
    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(Wrapped())

    names = ["0.base_layer.0", "0.base_layer.1", "0.base_layers.0"]
    model = get_peft_model(make(), SORSAConfig(r=2, target_modules=r"0\.base_layers?\.\d"))
    perturb(model)
    model.save_pretrained(tmp_path / "sorsa")
    assert [layer.name for layer in inspect_adapter(tmp_path / "sorsa").layers] == names
    export_lora(tmp_path / "sorsa", tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / CONFIG).read_text())["target_modules"] == names
    lora = PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    # three layers of products of at most 8 terms, rounded in fp32
    torch.testing.assert_close(lora(x), model.eval()(x), rtol=0, atol=64 * U32 * float(model(x).abs().max()))


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_model_card_names_the_command(saved):
    assert "sorsa export-lora DIRECTORY --beside" in (saved / "README.md").read_text()


@pytest.fixture
def of_dense_layers(tmp_path):
    """An adapter as earlier versions wrote it: on dense layers whose names PEFT takes for the experts'."""
    names = [f"model.layers.0.mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    config = SORSAConfig(r=2, target_modules=[], target_parameters=[f"{name}.weight" for name in names])
    model = get_peft_model(tiny_deepseek(), config)
    perturb(model, scale=0.3)
    config.target_modules, config.target_parameters = {name.removeprefix("model.layers.") for name in names}, None
    config.lora_layouts, config.adapted_layers = {name: ["weight"] for name in names}, None
    model.save_pretrained(tmp_path / "sorsa")
    return tmp_path / "sorsa"


def test_dense_layers_beside_experts_stay_what_they_are(of_dense_layers, tmp_path, tokens):
    """PEFT takes a LoRA's target named gate_proj for the fused experts' in such a model."""
    model = PeftModel.from_pretrained(tiny_deepseek(), of_dense_layers).eval()
    export_lora(of_dense_layers, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny_deepseek(), tmp_path / "lora").eval()
    with torch.no_grad():
        found, expected, base = loaded(tokens).logits, model(tokens).logits, tiny_deepseek()(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected - base).abs().max() > 1e-3


def test_peft_refuses_to_convert_dense_layers_beside_experts(of_dense_layers):
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(PeftModel.from_pretrained(tiny_deepseek(), of_dense_layers), rank=4)
