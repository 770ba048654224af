"""Every private name of PEFT, transformers and accelerate that the core uses is there, and means what it meant."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from builders.models import tiny_qwen3_moe
from peft import LoraConfig, PeftType, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from sorsa_plugin import SORSALayer, SORSAModel, compat
from sorsa_plugin.compat import accelerate, peft, transformers
from sorsa_plugin.errors import OldPackageError

MODULES = (peft, transformers, accelerate)
OURS = {peft.BaseTuner: SORSAModel, peft.LoraModel: SORSAModel, peft.BaseTunerLayer: SORSALayer}


def small_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def names_defined(module: ModuleType) -> set[str]:
    """What a compat file imports from the package, and its functions; less what only its functions use."""
    tree = ast.parse(Path(module.__file__ or "").read_text())
    imported = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module not in ("__future__", "typing")
        for alias in node.names
    }
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    used_inside = {name.id for function in functions for name in ast.walk(function) if isinstance(name, ast.Name)}
    return (imported - used_inside) | {function.name for function in functions}


def accepts(ours: Callable[..., Any], theirs: Callable[..., Any]) -> bool:
    """Whether a method of ours takes every argument that the one in its place takes."""
    known = inspect.signature(ours).parameters
    kinds = {parameter.kind for parameter in known.values()}
    if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
        return True
    stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [name for name, p in inspect.signature(theirs).parameters.items() if p.kind not in stars]
    return set(named) <= set(known) or inspect.Parameter.VAR_POSITIONAL in kinds


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_name_has_an_entry_and_every_entry_a_name(module: ModuleType) -> None:
    assert all(hasattr(module, name) for name in module.ENTRIES)
    assert names_defined(module) <= set(module.ENTRIES)


@pytest.mark.parametrize(
    ("theirs", "method"), [(theirs, method) for theirs, methods in peft.OVERRIDDEN.items() for method in methods]
)
def test_peft_has_the_methods_that_ours_replace_with_arguments_that_ours_take(theirs: type, method: str) -> None:
    assert accepts(getattr(OURS[theirs], method), getattr(theirs, method))


@pytest.mark.parametrize(
    ("theirs", "method"), [(theirs, method) for theirs, methods in peft.CALLED.items() for method in methods]
)
def test_peft_has_the_methods_that_ours_call(theirs: type, method: str) -> None:
    assert callable(getattr(theirs, method))


@pytest.mark.parametrize("method", peft.BORROWED)
def test_methods_borrowed_of_loras_model_are_ours_too(method: str) -> None:
    assert getattr(SORSAModel, method) is getattr(peft.LoraModel, method)


def test_the_enum_takes_a_member_once_and_pickles_it() -> None:
    peft.add_peft_type("SORSA")
    members = list(PeftType)
    peft.add_peft_type("SORSA")
    assert list(PeftType) == members
    assert pickle.loads(pickle.dumps(PeftType.SORSA)) is PeftType.SORSA is PeftType("SORSA")


def test_pattern_keys_and_targets_match_as_we_read_them() -> None:
    assert peft.get_pattern_key(["q_proj", "^layers.0.k_proj"], "layers.0.q_proj") == "q_proj"
    assert peft.get_pattern_key(["v_proj"], "layers.0.q_proj") == "layers.0.q_proj"
    config = LoraConfig(target_modules=["q_proj"])
    assert peft.check_target_module_exists(config, "layers.0.q_proj")
    assert not peft.check_target_module_exists(config, "layers.0.k_proj")


def test_merging_asks_for_the_active_adapters_and_leaves_out_merged_ones() -> None:
    model = get_peft_model(small_llama(), LoraConfig(target_modules=["q_proj"]))
    layer = next(module for module in model.modules() if isinstance(module, peft.LoraLayer))
    assert peft.check_adapters_to_merge(layer, None) == ["default"]
    layer.merge()
    with pytest.warns(UserWarning, match="merged"):
        assert peft.check_adapters_to_merge(layer, ["default"]) == []


def test_wrappers_of_trained_modules_tell_their_adapters() -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(small_llama(), config)
    wrappers = [module for module in model.modules() if isinstance(module, peft.AuxiliaryTrainingWrapper)]
    assert [wrapper._get_available_adapters() for wrapper in wrappers] == [{"default"}]
    assert all(isinstance(wrapper.original_module, nn.Linear) for wrapper in wrappers)


def test_trained_tokens_tell_their_rows() -> None:
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 3]})
    model = get_peft_model(small_llama(), config)
    (wrapper,) = [module for module in model.modules() if isinstance(module, peft.TrainableTokensWrapper)]
    assert list(wrapper.token_adapter.token_indices["default"]) == [1, 3]
    assert wrapper.token_adapter.tied_adapter is None


def test_peft_rewrites_a_loras_targets_on_a_model_of_experts_alone() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "up_proj"])
    found = peft.targets_of_lora(config, tiny_qwen3_moe())
    assert (set(found.target_modules), set(found.target_parameters)) == ({"q_proj"}, {"gate_up_proj"})
    assert list(found.rank_pattern.values()) == [8]
    unchanged = peft.targets_of_lora(config, small_llama())
    assert (set(unchanged.target_modules), unchanged.target_parameters) == (set(config.target_modules), None)
    assert (config.target_parameters, config.rank_pattern) == (None, {})


def test_a_model_is_built_on_the_meta_device_in_its_dtype() -> None:
    model = transformers.build_on_meta(LlamaForCausalLM._from_config, small_llama().config, torch.bfloat16)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_the_parameters_that_stay_fp32_are_named() -> None:
    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_decoder_layers=1, num_heads=2)
    kept = transformers.kept_in_fp32(T5ForConditionalGeneration(config), torch.float16)
    assert kept
    assert all(".wo." in name for name in kept)
    assert transformers.kept_in_fp32(small_llama(), torch.float16) == []


def test_conversions_of_fused_experts_are_listed_and_undone() -> None:
    assert isinstance(transformers.get_model_conversion_mapping(small_llama()), list)
    assert sorted(["b.10", "b.9"], key=transformers.dot_natural_key) == ["b.9", "b.10"]
    known = {"lm_head.weight": torch.empty(0)}
    assert transformers.rename_source_key("lm_head.weight", [], [], "model", known) == ("lm_head.weight", None)


def test_headers_are_read_as_meta_tensors_and_dtypes_have_safetensors_names(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    header = transformers.load_state_dict(str(tmp_path / "a.safetensors"), map_location="meta")
    assert header["a"].is_meta
    assert (header["a"].shape, header["a"].dtype) == ((2, 3), torch.bfloat16)
    assert transformers.str_to_torch_dtype["BF16"] is torch.bfloat16
    assert transformers.str_to_torch_dtype["F32"] is torch.float32


def test_models_are_whole_where_deepspeed_is_not_configured() -> None:
    assert transformers.is_deepspeed_zero3_enabled() is False


def test_offloaded_weights_come_back_for_a_moment_and_for_good() -> None:
    module = nn.Linear(2, 2)
    weight = module.weight.detach().clone()
    accelerate.add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", offload=True))
    assert accelerate.has_offloaded_params(module)
    assert accelerate.execution_device(module) == torch.device("cpu")
    assert accelerate.hook_of(module) is not None
    assert module.weight.is_meta
    with accelerate.align_module_device(module):
        assert torch.equal(module.weight, weight)
    accelerate.remove_hook_from_module(module)
    assert accelerate.hook_of(module) is None
    assert torch.equal(module.weight, weight)
    assert accelerate.execution_device(module) is None


def test_a_package_that_is_too_old_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(compat, "version", lambda name: "0.18.1" if name == "peft" else real(name))
    with pytest.raises(OldPackageError, match=r"peft 0\.18\.1 is installed; .* needs 0\.20 or later. Run: pip install"):
        compat.require_floors()
