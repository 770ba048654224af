"""Batches of mixed adapters: each row is the row of its adapter alone, and what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders.llama import tiny_llama
from builders.one_layer import TwoLayers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig

from sorsa_plugin import SORSAConfig

NAMES = ["first", "__base__", "second", "first", "second", "__base__"]


def two_adapters(base: nn.Module, first: Any, second: Any, **options: Any) -> PeftModel:
    """Adapters "first" (rank 4) and "second" (rank 2) with random changes, in eval mode; "second" is the active one."""
    torch.manual_seed(1)
    options["init_weights"] = False
    model = get_peft_model(base, SORSAConfig(r=4, target_modules=first, **options), "first")
    model.add_adapter("second", SORSAConfig(r=2, target_modules=second, **options))
    model.set_adapter("second")
    return model.eval()


@pytest.fixture
def layers() -> PeftModel:
    torch.manual_seed(0)
    return two_adapters(TwoLayers(), ["linear", "conv1d"], ["linear"])


@pytest.fixture
def llama_two() -> PeftModel:
    return two_adapters(tiny_llama(), "all-linear", ["q_proj", "down_proj"], task_type="CAUSAL_LM")


def alone(model: PeftModel, name: str, run: Any) -> Any:
    """What `run()` gives with one adapter, or the base, for the whole batch."""
    if name == "__base__":
        with model.disable_adapter():
            return run()
    model.set_adapter(name)
    return run()


@pytest.mark.parametrize("shape", [(6, 7), (6, 3, 7)])
@torch.no_grad()
def test_each_row_of_linear_and_conv1d_is_the_row_of_its_adapter_alone(
    layers: PeftModel, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    mixed = layers(x, adapter_names=NAMES)
    outputs = {name: alone(layers, name, lambda: layers(x)) for name in set(NAMES)}

    assert not torch.allclose(outputs["first"], outputs["second"], atol=1e-2)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], outputs[name][row], atol=1e-5, rtol=1e-5)
        if name == "__base__":
            assert torch.equal(mixed[row], outputs[name][row])


@torch.no_grad()
def test_each_row_of_a_llama_is_the_row_of_its_adapter_alone(llama_two: PeftModel) -> None:
    ids = torch.randint(1, 64, (6, 9))
    mixed = llama_two(ids, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        expected = alone(llama_two, name, lambda: llama_two(ids).logits)
        torch.testing.assert_close(mixed[row], expected[row], atol=1e-4, rtol=1e-4)
        if name == "__base__":
            assert torch.equal(mixed[row], expected[row])


@torch.no_grad()
def test_the_rows_keep_the_dtype_of_a_bf16_base() -> None:
    model = two_adapters(TwoLayers().bfloat16(), ["linear", "conv1d"], ["linear"])
    x = torch.randn(6, 7, dtype=torch.bfloat16)
    mixed = model(x, adapter_names=NAMES)
    assert mixed.dtype == torch.bfloat16
    expected = alone(model, "first", lambda: model(x))
    torch.testing.assert_close(mixed[[0, 3]], expected[[0, 3]], atol=5e-2, rtol=5e-2)


@torch.no_grad()
def test_modules_to_save_take_part() -> None:
    torch.manual_seed(0)
    model = two_adapters(TwoLayers(), ["conv1d"], ["conv1d"], modules_to_save=["linear"])
    model.base_model.model.linear.modules_to_save["first"].weight.mul_(2)
    x = torch.randn(6, 7)
    mixed = model(x, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], alone(model, name, lambda: model(x))[row], atol=1e-5, rtol=1e-5)


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "beams in a generation config": {"generation_config": GenerationConfig(num_beams=3, max_new_tokens=6)},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
@torch.no_grad()
def test_generate_gives_each_row_what_its_adapter_alone_gives(llama_two: PeftModel, options: dict[str, Any]) -> None:
    if "generation_config" not in options:
        options = {**options, "max_new_tokens": 6}
    ids = torch.randint(1, 64, (6, 5), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "eos_token_id": None, **options}
    mixed = llama_two.generate(**inputs, adapter_names=NAMES)
    outputs = {
        name: alone(llama_two, name, lambda: llama_two.generate(**inputs)) for name in ("first", "second", "__base__")
    }

    assert not torch.equal(outputs["first"], outputs["second"])
    each = len(mixed) // len(NAMES)
    for row, name in enumerate(NAMES):
        rows = slice(row * each, (row + 1) * each)
        assert torch.equal(mixed[rows], outputs[name][rows]), name


@torch.no_grad()
def test_generate_samples_several_sequences_per_row(llama_two: PeftModel) -> None:
    ids = torch.randint(1, 64, (2, 5))
    inputs = {"input_ids": ids, "max_new_tokens": 3, "do_sample": True, "num_return_sequences": 3}
    assert len(llama_two.generate(**inputs, adapter_names=["first", "__base__"])) == 6


@torch.no_grad()
def test_an_encoder_sees_each_row_once_where_beams_repeat_them() -> None:
    torch.manual_seed(0)
    sides = {
        f"{side}_{part}": value
        for side in ("encoder", "decoder")
        for part, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 24}.items()
    }
    config = BartConfig(vocab_size=64, d_model=16, max_position_embeddings=32, **sides)
    model = two_adapters(
        BartForConditionalGeneration(config).eval(), ["q_proj", "fc1"], ["v_proj"], task_type="SEQ_2_SEQ_LM"
    )
    ids = torch.randint(3, 64, (6, 5))
    inputs = {"input_ids": ids, "num_beams": 3, "max_new_tokens": 5, "eos_token_id": None, "forced_eos_token_id": None}
    mixed = model.generate(**inputs, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        assert torch.equal(mixed[row], alone(model, name, lambda: model.generate(**inputs))[row]), name


@torch.no_grad()
def test_disabling_adapters_wins_over_adapter_names(layers: PeftModel) -> None:
    x = torch.randn(6, 7)
    with layers.disable_adapter():
        assert torch.equal(layers(x, adapter_names=NAMES), layers(x))


@torch.no_grad()
def test_an_ordinary_forward_after_a_mixed_one_is_as_before_even_if_that_failed(layers: PeftModel) -> None:
    x = torch.randn(6, 7)
    before = layers(x)
    layers(x, adapter_names=NAMES)
    with pytest.raises(ValueError, match="Length of"):
        layers(x, adapter_names=NAMES[:2])
    assert torch.equal(layers(x), before)


@pytest.mark.parametrize(
    ("adapter_names", "error", "message"),
    [
        (
            ["first"] * 5,
            ValueError,
            "Length of `adapter_names` should be the same as the number of inputs, but got 5 and 6",
        ),
        (["first"] * 5 + ["typo"], ValueError, r"Trying to infer with non-existing adapter\(s\): typo"),
        ("first", TypeError, "expected a list of str"),
    ],
)
def test_wrong_adapter_names_are_refused(
    layers: PeftModel, adapter_names: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        layers(torch.randn(6, 7), adapter_names=adapter_names)


def test_training_mode_is_refused(layers: PeftModel) -> None:
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        layers.train()(torch.randn(6, 7), adapter_names=NAMES)


def test_merged_adapters_are_refused_and_unmerged_ones_work_again(layers: PeftModel) -> None:
    layers.merge_adapter(["first"])
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
        layers(torch.randn(6, 7), adapter_names=NAMES)
    layers.unmerge_adapter()
    layers(torch.randn(6, 7), adapter_names=NAMES)


def test_offsets_of_an_activated_lora_are_refused(layers: PeftModel) -> None:
    with pytest.raises(ValueError, match="alora_offsets"):
        layers(torch.randn(6, 7), alora_offsets=[1] * 6)
