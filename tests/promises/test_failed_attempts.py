"""An adapter that cannot be made or loaded leaves the model as it was, and the next attempt knows nothing of it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import assert_same_tensors, perturb, snapshot
from builders.llama import tiny_llama
from peft import PeftModel, get_peft_model

import sorsa_plugin.tuner.initialise
from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import BaseMismatchError, IncompleteAdapterError, RankError, UnsupportedLayerError
from sorsa_plugin.layers.layer import sorsa_layers


def structure(model: torch.nn.Module) -> dict[str, Any]:
    """Its modules, themselves, and which of its parameters train."""
    trained = {f"{name} trains": p.requires_grad for name, p in model.named_parameters()}
    return {**dict(model.named_modules()), **trained}


def interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the third factorisation."""
    calls, own = [], sorsa_plugin.tuner.initialise.factorise

    def factorise(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(*args, **options)

    monkeypatch.setattr(sorsa_plugin.tuner.initialise, "factorise", factorise)


# k_proj has 16 triplets
FAILURES: dict[str, tuple[dict[str, Any], type[BaseException]]] = {
    "rank": ({"rank_pattern": {"k_proj": 20}, "target_modules": ["q_proj", "k_proj"]}, RankError),
    "unsupported": ({"target_modules": ["q_proj", "norm"]}, UnsupportedLayerError),
    "no-such-token-layer": ({"target_modules": ["q_proj"], "trainable_token_indices": {"nowhere": [1]}}, ValueError),
    "interrupted": ({"target_modules": "all-linear", "modules_to_save": ["lm_head"]}, KeyboardInterrupt),
    "interrupted-tokens": ({"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": [3]}, KeyboardInterrupt),
}


@pytest.fixture(params=FAILURES)
def failure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[SORSAConfig, type[BaseException]]:
    options, error = FAILURES[request.param]
    if error is KeyboardInterrupt:
        interrupt(monkeypatch)
    return SORSAConfig(**{"r": 2, **options}), error


def test_a_first_adapter_that_cannot_be_made_leaves_the_base_model(
    failure: tuple[SORSAConfig, type[BaseException]],
) -> None:
    config, error = failure
    base, given = tiny_llama(), copy.deepcopy(config)
    before, tensors = structure(base), snapshot(base)
    with pytest.raises(error):
        get_peft_model(base, config)
    assert structure(base) == before
    assert_same_tensors(snapshot(base), tensors)
    given.base_model_name_or_path = config.base_model_name_or_path  # PEFT 0.20 notes it before it makes the adapter
    assert config == given


@pytest.mark.parametrize("beside", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}], ids=str)
def test_a_further_adapter_that_cannot_be_made_leaves_the_others(
    failure: tuple[SORSAConfig, type[BaseException]], beside: dict[str, Any]
) -> None:
    config, error = failure
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj"], svd_seed=1, **beside))
    perturb(model)
    before, tensors = structure(model), snapshot(model)
    with pytest.raises(error):
        model.add_adapter("second", config)
    assert structure(model) == before
    assert_same_tensors(snapshot(model), tensors)
    # an interruption passes PEFT's own clean-up by
    assert model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default"]


def test_the_next_attempt_trains_and_saves_its_own_layers_alone(tokens: torch.Tensor, tmp_path: Path) -> None:
    base = tiny_llama()
    with pytest.raises(RankError):
        get_peft_model(base, SORSAConfig(r=2, rank_pattern={"k_proj": 20}, target_modules=["q_proj", "k_proj"]))
    model = get_peft_model(base, SORSAConfig(r=2, target_modules=["v_proj"])).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(name: str, seed: int, targets: list[str]) -> Path:
        model = get_peft_model(tiny_llama(seed=seed), SORSAConfig(r=2, target_modules=targets))
        perturb(model)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def test_the_right_adapter_can_be_loaded_after_another_was_refused(saved: Callable[..., Path]) -> None:
    right, wrong = saved("right", 0, ["q_proj"]), saved("wrong", 5, ["q_proj", "up_proj"])
    base = tiny_llama()
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(base, wrong)
    loaded, expected = PeftModel.from_pretrained(base, right), PeftModel.from_pretrained(tiny_llama(), right)
    assert [layer.name for layer in sorsa_layers(loaded)] == [layer.name for layer in sorsa_layers(expected)]
    assert_same_tensors(loaded.state_dict(), expected.state_dict())


def test_a_further_adapter_can_be_loaded_after_another_was_refused_and_deleted(saved: Callable[..., Path]) -> None:
    right, wrong = saved("right", 0, ["q_proj"]), saved("wrong", 5, ["v_proj"])
    model = PeftModel.from_pretrained(tiny_llama(), right)
    with pytest.raises(BaseMismatchError):
        model.load_adapter(wrong, "second")
    model.delete_adapter("second")
    model.load_adapter(right, "second")
    model.set_adapter("second")
    for layer in sorsa_layers(model):
        for adapter in layer.sorsa_factors:
            assert layer.ready_factors(adapter).dU.any()


def test_a_file_with_more_layers_than_its_config_selects_is_refused(saved: Callable[..., Path]) -> None:
    larger, smaller = saved("larger", 0, ["q_proj", "up_proj"]), saved("smaller", 0, ["q_proj"])
    shutil.copy(larger / "adapter_model.safetensors", smaller)
    with pytest.raises(IncompleteAdapterError, match=r"tensors for 2 layers .* first of them model\.layers\.0\.mlp"):
        PeftModel.from_pretrained(tiny_llama(), smaller)
