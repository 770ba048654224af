"""What is run, what is left out and what is expected to fail: the one place to edit."""

from __future__ import annotations

from typing import Any

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import SORSAConfigError

FILES = (
    "test_custom_models.py",
    "test_config.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_target_parameters.py",
)

BORROWED_FILES = (
    "test_tuners_utils.py",
    "test_low_level_api.py",
    "test_helpers.py",
    "test_lora_conversion.py",
    "test_mixed.py",
    "test_trainable_tokens.py",
)
"""Files with tests for LoRA alone, tried by `borrowed.py`."""

HUB = "needs the Hugging Face Hub"
NO_DROPOUT = "dropout is refused where the change has no input of its own; LoRA ignores it"
EXPECTED_FAILURES: list[tuple[tuple[str, ...], type[Exception], str]] = [
    (("test_from_pretrained[",), ValueError, HUB),
    (("test_from_pretrained_cache_dir[",), ValueError, HUB),
    (("test_save_pretrained_with_runtime_config[",), ValueError, HUB),
    (
        ("mixed_adapter_batches[", "config_kwargs1", "OPTForCausalLM"),
        ValueError,
        "OPT flattens batch and length before fc1, so that a row is no longer a sample: PEFT's LoRA raises the same",
    ),
    (("mixed_adapter_batches[", "Llama4"), AssertionError, "refused as by LoRA, in other words than it expects"),
    (("mixed_adapter_batches[", "GptOss"), AssertionError, "refused as by LoRA, in other words than it expects"),
    (("mixed_adapter_batches_mha_raises",), ValueError, "refused as by LoRA, with another type of error"),
    (("is_deterministic_in_train_mode", "Groups"), SORSAConfigError, NO_DROPOUT),
    (("is_deterministic_in_train_mode", "MHA"), SORSAConfigError, NO_DROPOUT),
    (("test_safe_merge[", "as Conv2d 2 LoRA"), AssertionError, "asks 1e-6 where it allows LoRA 1e-3 by name"),
]
"""(what the test's name contains, the error it stops with, why). One that passes is reported as XPASS."""

SAME_BASE = {
    "test_loading_model_requires_grad_set_correctly": "DeepMLP",
    "test_loading_model_with_modules_to_save_requires_grad_set_correctly": "DeepMLP",
}
"""{test: the model it makes twice, with other random weights}. Seeded here: an adapter on another base is refused."""

RANDOM_TWICE = ("test_save_load_roundtrip_fsdp_wrapped[",)
"""Tests that load random factors (init_weights=False) into an adapter with factors of its base, which is refused: they
are no triplets of the weight. Here that adapter is made of random factors too, which are others."""

LEARNING_RATES = [
    (("test_parameters_after_loading_model",), 0.01),
    (("test_disable_adapters[", "Conv2dGroups2"), 1e-4),
]
"""(what the test's name contains, the highest learning rate of its SGD), where PEFT's own gives NaN; PEFT lowers it so
for methods of its own."""


def _on(model: str, name: str, rank: int, **options: Any) -> tuple[str, str, type[SORSAConfig], dict[str, Any]]:
    return f"SORSA {name}", model, SORSAConfig, {"r": rank, **options}


_CUSTOM = [
    _on("MLP", "rank_pattern", 2, target_modules=["lin0", "lin1"], rank_pattern={"lin0": 5}),
    _on("MLP", "full rank", 10, target_modules=["lin0"]),
    _on("MLP", "exclude_modules", 3, target_modules="lin.*", exclude_modules=["lin1"]),
    _on("Conv1dBigger", "convolution", 4, target_modules=["conv1d"]),
    _on("Conv1dGroups", "grouped convolution", 4, target_modules=["conv1d"]),
    _on("Conv2d1x1", "convolution", 1, target_modules=["conv2d"]),
    _on("Conv2d2", "convolution", 4, target_modules=["conv2d", "lin0"]),
    _on("MHA", "attention of a low rank", 4, target_modules=["mha"]),
    _on("MLP", "parameter and linear of a low rank", 2, target_modules=["lin0"], target_parameters=["lin1.weight"]),
]
"""Rows beside LoRA's own, which run as PEFT writes them (`plugin._loras_rows`)."""

SHARED = {
    "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "task_type", "layers_to_transform",
    "layers_pattern", "rank_pattern", "trainable_token_indices", "ensure_weight_tying", "inference_mode",
    "fan_in_fan_out", "base_model_name_or_path", "revision", "r",
}  # fmt: skip
"""LoRA's options that SORSA has with the same name and meaning."""
TRANSLATED = {"lora_alpha", "lora_dropout", "init_lora_weights", "bias"}
"""LoRA's options that are given another value here, or have no meaning at LoRA's default."""


def _random(rank: int, *modules: str) -> dict[str, Any]:
    return {"r": rank, "target_modules": list(modules), "init_weights": False}


_PAIRS = [
    ("same", _random(4, "lin0"), _random(4, "lin0")),
    ("other layer", _random(2, "lin0"), _random(2, "lin1")),
    ("rank up", _random(2, "lin0"), _random(6, "lin0")),
    ("rank down", _random(6, "lin0"), _random(2, "lin0")),
]
_MIXED = [
    ("ranks", _random(4, "lin0"), _random(7, "lin0")),
    ("overlapping layers", _random(4, "lin0"), _random(2, "lin0", "lin1")),
]


def _architectures(task: str) -> list[tuple[type[SORSAConfig], dict[str, Any]]]:
    return [(SORSAConfig, {"r": 4, "task_type": task, "target_modules": None})]


_LLAMA4, _GPT_OSS = "trl-internal-testing/tiny-Llama4ForCausalLM", "trl-internal-testing/tiny-GptOssForCausalLM"


def _experts(model: str, experts: str) -> list[tuple[str, type[SORSAConfig], dict[str, Any]]]:
    gate_up, down = f"{experts}.gate_up_proj", f"{experts}.down_proj"
    targets: list[dict[str, Any]] = [
        {"target_modules": [], "target_parameters": [down]},
        {"target_modules": [], "target_parameters": [f"0.{gate_up}", f"1.{down}"]},
        {"target_modules": None, "target_parameters": [down, gate_up]},
        {"target_modules": ["q_proj", "v_proj"], "target_parameters": [down]},
    ]
    return [(model, SORSAConfig, {"r": 2, "task_type": "CAUSAL_LM", **target}) for target in targets]


LISTS: dict[str, dict[str, list[Any]]] = {
    "test_custom_models": {
        "TEST_CASES": _CUSTOM,
        "ALL_PEFT_CONFIG_CLASSES": [SORSAConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [(f"SORSA {n}", "sorsa", SORSAConfig, a, b) for n, a, b in _PAIRS],
        "MIXED_ADAPTER_TEST_CASES": [(f"SORSA {n}", SORSAConfig(**a), SORSAConfig(**b)) for n, a, b in _MIXED],
    },
    "test_decoder_models": {
        "ALL_CONFIGS": [
            *_architectures("CAUSAL_LM"),
            # r = 2: one test converts to a LoRA of rank 4, and the change of rank r is a LoRA of rank 2r
            (SORSAConfig, {"r": 2, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}),
        ]
    },
    "test_encoder_decoder_models": {"ALL_CONFIGS": _architectures("SEQ_2_SEQ_LM")},
    "test_feature_extraction_models": {"ALL_CONFIGS": _architectures("FEATURE_EXTRACTION")},
    "test_seq_classifier": {"ALL_CONFIGS": _architectures("SEQ_CLS")},
    "test_target_parameters": {
        "ALL_CONFIGS": [*_experts(_LLAMA4, "feed_forward.experts"), *_experts(_GPT_OSS, "mlp.experts")]
    },
}
"""{file: {list in it that PEFT parametrizes its tests over: what stands there instead}}."""

CONFIG_ROWS: list[tuple[type[SORSAConfig], dict[str, Any]]] = [(SORSAConfig, {})]
"""The rows of test_config.py, whose lists are tuples."""

INLINE = (
    "test_mixed_adapter_batches_different_target_layers",
    "test_mixed_adapter_batches_multiple_modules_to_save",
    "test_mixed_adapter_batches_partly_overlapping_target_layers",
    "test_mixed_adapter_batches_unsupported_layer_raises",
    "test_mixed_adapter_batches_lora_wrong_adapter_name_raises",
    "test_mixed_adapter_batches_lora_conv1d_emb",
    "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save",
    "test_mixed_adapter_batches_lora_conv2d",
    "test_mixed_adapter_batches_mha_raises",
    "test_multiple_adapters_mixed_modules_to_save",
    "test_multiple_adapters_mixed_modules_to_save_order_switched",
    "test_adapter_name_makes_no_difference",
    "test_default_target_modules_not_set_raises",
    "test_default_target_modules_not_set_model_type_set_raises",
)
"""Tests parametrized over a list of their own, of which the rows for LoRA are run as SORSA's."""
