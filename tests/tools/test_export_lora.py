"""An exported adapter is an ordinary LoRA: the same function without this package, whole or not at all on disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from builders.llama import tiny_llama
from builders.one_layer import SHAPES, adapt, make_base, only_layer, perturb, refuse_to_factorise
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from sorsa_plugin import SORSAConfig, export_lora, save_adapter
from sorsa_plugin.errors import ForeignAdapterError, RankError
from sorsa_plugin.linalg.offset_form import Parts
from sorsa_plugin.regularizer.trained_factors import sorsa_layers
from sorsa_plugin.tools.inspect_adapter import inspect_adapter

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


TOKENS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(7))


U32, U16 = 2.0**-24, 2.0**-11
"""Unit roundoff of fp32 and fp16."""


def llama_with_biases() -> LlamaForCausalLM:
    torch.manual_seed(1)
    options = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, pad_token_id=0, **options)
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """Conv1D layers and, with lm_head, an nn.Linear."""
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16, tie_word_embeddings=False)
    return GPT2LMHeadModel(config).eval()


def trained(base, **options) -> PeftModel:
    """A model with an adapter that has moved, in eval mode."""
    options = {"r": 3, "target_modules": "all-linear", **options}
    model = get_peft_model(base, SORSAConfig(**options))
    perturb(model)
    return model.eval()


CASES = {
    "llama-all-linear": (tiny_llama, {"task_type": "CAUSAL_LM"}),
    "biases": (llama_with_biases, {"target_modules": r".*\.(q_proj|down_proj)"}),
    "rank-pattern": (tiny_llama, {"rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.up_proj": 1}}),
    "conv1d": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-and-linear": (tiny_gpt2, {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True}),
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
    directory = tmp_path_factory.mktemp("saved")
    trained(tiny_llama()).save_pretrained(directory)
    return directory


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
        # the pair that the layer computes with; that it is U S V^T - U0 S0 V0^T, tests/test_lowrank.py shows
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


@pytest.mark.parametrize(
    ("r", "advice"), [(8, None), (9, "--max-lora-rank 32"), (256, "--max-lora-rank 512"), (257, "--rank 512")]
)
def test_a_rank_above_what_vllm_takes_by_default_is_pointed_out(tmp_path, caplog, r, advice):
    adapt(make_base(shape=(300, 300)), r=r, init_weights=False).save_pretrained(tmp_path / "sorsa")
    export_lora(tmp_path / "sorsa", tmp_path / "lora")
    assert (advice in caplog.text) if advice else not caplog.records


def test_whole_tensors_that_servers_refuse_are_pointed_out(served, tmp_path, caplog):
    export_lora(served["modules-to-save"]["directory"] / "sorsa", tmp_path / "lora")
    assert "carries whole tensors (modules_to_save or embeddings; 2, the first" in caplog.text


# -- truncation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize(("shape", "r"), [*((s, 4) for s in SHAPES.values()), ((40, 6), 5)], ids=str)
def test_the_truncation_error_is_the_optimum_by_svd_of_the_dense_change(tmp_path, shape, r, rank):
    model = adapt(make_base(shape=shape), r=r)
    perturb(model)
    model.save_pretrained(tmp_path / "sorsa")
    report = export_lora(tmp_path / "sorsa", tmp_path / "lora", rank=rank)
    L, R = (part.detach().double() for part in only_layer(model).factors("default").low_rank_pair())
    S = torch.linalg.svdvals(L @ R.T)
    optimum = S[rank:].norm()
    # Both are float64 computations from the same numbers: they differ by 2^-53 S_1 times modest powers of the
    # dimension, far below 1e-12 of the norm.
    assert report.rank == rank
    assert abs(report.relative_error - optimum / S.norm()) <= 1e-12
    assert report.layers[0].relative_error == report.relative_error
    A, B = (load_file(tmp_path / "lora" / FILE)[f"base_model.model.proj.lora_{part}.weight"] for part in "AB")
    # On disk each factor is rounded once: (2u + u^2) |B||A| elementwise, and |B||A| <= sum of S_k in the norm.
    rounding = (2 * U32 + U32**2) * S[:rank].sum() * (1 + U32)
    assert abs((L @ R.T - B.double() @ A.double()).norm() - optimum) <= rounding + 1e-12 * S[0]


def test_the_total_error_is_that_of_all_layers_together_and_whole_layers_stay_whole(tmp_path):
    model = trained(tiny_llama(), rank_pattern={"q_proj": 1})
    model.save_pretrained(tmp_path / "sorsa")
    report = export_lora(tmp_path / "sorsa", tmp_path / "lora", rank=2)
    lost = total = 0.0
    errors = {layer.name: layer.relative_error for layer in report.layers}
    for layer in sorsa_layers(model):
        S = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double())
        lost, total = lost + float(S[2:].square().sum()), total + float(S.square().sum())
        assert (errors[layer.name] == 0) == ("q_proj" in layer.name)
    # the change as get_delta_weight forms it is rounded in fp32, here: 1e-5 covers 2r u with room
    assert report.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-5)


def test_a_rank_that_truncates_nothing_gives_the_exact_file(saved, tmp_path):
    export_lora(saved, tmp_path / "exact")
    report = export_lora(saved, tmp_path / "more", rank=64)
    assert (report.rank, report.relative_error) == (6, 0.0)
    assert (tmp_path / "exact" / FILE).read_bytes() == (tmp_path / "more" / FILE).read_bytes()


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4"])
def test_a_rank_that_is_no_positive_integer_is_an_error_before_anything_is_written(saved, tmp_path, rank):
    with pytest.raises(RankError, match=r"rank is .*; expected an integer >= 1"):
        export_lora(saved, tmp_path / "new" / "lora", rank=rank)
    assert not any(tmp_path.iterdir())


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
    assert "sorsa export-lora path/to/this/adapter -o lora" in (saved / "README.md").read_text()


def deepseek():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    heads |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    config = DeepseekV3Config(**sizes, **heads, **experts, num_hidden_layers=2, first_k_dense_replace=1)
    return DeepseekV3ForCausalLM(config).eval()


def test_dense_layers_beside_experts_stay_what_they_are(tmp_path, tokens):
    """PEFT takes a LoRA's target named gate_proj for the fused experts' in such a model."""
    model = get_peft_model(deepseek(), SORSAConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    perturb(model, scale=0.3)
    model.save_pretrained(tmp_path / "sorsa")
    export_lora(tmp_path / "sorsa", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(deepseek(), tmp_path / "lora").eval()
    with torch.no_grad():
        found, expected, base = loaded(tokens).logits, model.eval()(tokens).logits, deepseek()(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2


def test_peft_refuses_to_convert_dense_layers_beside_experts():
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(get_peft_model(deepseek(), SORSAConfig(r=2, target_modules=["gate_proj"])), rank=4)
