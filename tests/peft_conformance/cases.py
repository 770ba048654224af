"""What is run, what is left out and what is expected to fail: the one place to edit."""

from __future__ import annotations

from typing import Any

from sorsa_plugin import SORSAConfig

FILES = (
    "test_custom_models.py",
    "test_config.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
)

UNSUPPORTED_MODELS = ("EmbConv1D", "Conv2d")
"""Cases on these models are left out: SORSA has no embedding and no convolution kind, and refuses both in words."""

LEFT_OUT = {
    "test_mixed_adapter_batches_lora_conv1d_emb": "embedding and convolution kinds",
    "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save": "embedding and convolution kinds",
    "test_mixed_adapter_batches_lora_conv2d": "convolution kind",
}
"""{test: the unsupported kind it needs}, for tests with models of their own."""

HUB = "needs the Hugging Face Hub"
EXPECTED_FAILURES: list[tuple[tuple[str, ...], type[Exception], str]] = [
    (("test_from_pretrained[",), ValueError, HUB),
    (("test_from_pretrained_cache_dir[",), ValueError, HUB),
    (("test_save_pretrained_with_runtime_config[",), ValueError, HUB),
    (
        ("mixed_adapter_batches[", "config_kwargs1", "OPTForCausalLM"),
        ValueError,
        "OPT flattens batch and length before fc1, so that a row is no longer a sample: PEFT's LoRA raises the same",
    ),
]
"""(what the test's name contains, the error it stops with, why). One that passes is reported as XPASS."""

SAME_BASE = {
    "test_loading_model_requires_grad_set_correctly": "DeepMLP",
    "test_loading_model_with_modules_to_save_requires_grad_set_correctly": "DeepMLP",
}
"""{test: the model it makes twice, with other random weights}. Seeded here: an adapter on another base is refused."""

LEARNING_RATES = {"test_parameters_after_loading_model": 0.01}
"""{test: learning rate of its SGD}, where PEFT's 0.5 gives NaN; PEFT lowers it so for methods of its own."""


def _on(model: str, name: str, rank: int, **options: Any) -> tuple[str, str, type[SORSAConfig], dict[str, Any]]:
    return f"SORSA {name}", model, SORSAConfig, {"r": rank, **options}


_CUSTOM = [
    _on("MLP", "name", 4, target_modules="lin0"),
    _on("MLP", "list", 4, target_modules=["lin0"]),
    _on("MLP", "last layer", 2, target_modules=["lin1"]),
    _on("MLP", "two layers", 2, target_modules=["lin0", "lin1"]),
    _on("MLP", "modules_to_save", 4, target_modules=["lin0"], modules_to_save=["lin1"]),
    _on("MLP", "rank_pattern", 2, target_modules=["lin0", "lin1"], rank_pattern={"lin0": 5}),
    _on("MLP", "full rank", 10, target_modules=["lin0"]),
    _on("MLP", "exclude_modules", 3, target_modules="lin.*", exclude_modules=["lin1"]),
    _on("EmbConv1D", "convolution", 2, target_modules=["conv1d"]),
    _on("EmbConv1D", "embedding", 2, target_modules=["emb"]),
    _on("EmbConv1D", "embedding and convolution", 2, target_modules=["emb", "conv1d"]),
    _on("Conv2d", "convolution", 2, target_modules=["conv2d"]),
    _on("Conv2d", "convolution and linear", 2, target_modules=["conv2d", "lin0"]),
]


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


LISTS: dict[str, dict[str, list[Any]]] = {
    "test_custom_models": {
        "TEST_CASES": [case for case in _CUSTOM if case[1] not in UNSUPPORTED_MODELS],
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
    "test_multiple_adapters_mixed_modules_to_save",
    "test_multiple_adapters_mixed_modules_to_save_order_switched",
    "test_adapter_name_makes_no_difference",
    "test_default_target_modules_not_set_raises",
    "test_default_target_modules_not_set_model_type_set_raises",
)
"""Tests parametrized over a list of their own, of which the rows for LoRA are run as SORSA's."""
