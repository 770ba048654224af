"""Translates an Axolotl recipe's adapter keys into this package's words; refuses what SORSA cannot honour."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sorsa_plugin import SORSAConfig, setup_adapter
from sorsa_plugin.errors import AdapterOptionsError
from sorsa_plugin.extend import say

ADAPTERS = ("sorsa", "qsorsa")
BLOCK = "sorsa"
"""The recipe's block of options for either adapter."""

HONOURED = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_exclude_modules",
    "lora_modules_to_save",
    "lora_rank_pattern",
    "lora_target_parameters",
    "peft_layers_to_transform",
    "peft_layers_pattern",
    "peft_trainable_token_indices",
)
"""Axolotl's keys that go to `setup_adapter` as they are."""

OWN = {"lora_fan_in_fan_out": "fan_in_fan_out", "peft_ensure_weight_tying": "ensure_weight_tying"}
"""{Axolotl's flag: field of `SORSAConfig`}; few other methods have these fields."""

REFUSED = {
    "peft_use_dora": "DoRA is another method",
    "peft_use_rslora": "rsLoRA is a scale for LoRA, and SORSA has no scale",
    "peft_init_lora_weights": "SORSA starts from the singular triplets; how they are found is svd, in the sorsa block",
    "peft.loftq_config": "LoftQ is an initialisation of LoRA on a quantised base",
    "peft_layer_replication": "layers that share a weight cannot be factorised one by one",
    "lora_alpha_pattern": "SORSA has no scale",
    "lora_mlp_kernel": "the kernel computes LoRA's forward",
    "lora_qkv_kernel": "the kernel computes LoRA's forward",
    "lora_o_kernel": "the kernel computes LoRA's forward",
    "lora_embedding_kernel": "the kernel computes LoRA's forward",
    "loraplus_lr_ratio": "it is a learning rate for lora_B, which SORSA does not have",
    "relora": "ReLoRA merges and restarts LoRA",
    "qlora_sharded_model_loading": "it is for adapter: qlora",
    "gptq": "SORSA needs weights that can be read again, which bitsandbytes' can (load_in_4bit, load_in_8bit)",
    "qat": "the change that SORSA trains would not be quantised with the weight",
    "use_onebitllms": "its weights are not those that the triplets are taken from",
    "flash_attn_fuse_mlp": "it replaces the linear layers that are adapted",
    "trl.vllm_lora_sync": "vLLM takes LoRA files only; without the line TRL sends the merged weights",
}
"""{dotted name of a key: why it is refused}. Each would change nothing, or ask for another method than SORSA."""


def refuse_unhonoured(recipe: Mapping[str, Any]) -> None:
    """Check the keys of an unparsed recipe with one of our adapters.

    Raises:
        AdapterOptionsError: SORSA cannot honour some lines, all of which the message names; or the recipe is for
            inference and has no saved adapter.
    """
    if recipe.get("inference") and not recipe.get("lora_model_dir"):
        raise AdapterOptionsError(
            "lora_model_dir is not set, so inference would run with a new adapter, which answers as the base model "
            f"does. Add --lora-model-dir={recipe.get('output_dir')}, or where the adapter was saved."
        )
    found = {name: (value, why) for name, why in REFUSED.items() if _asks(value := _look_up(recipe, name))}
    init = "peft_init_lora_weights"
    if recipe.get(init) is True:
        found.pop(init, None)
    if recipe.get(init) is False:
        found[init] = (False, REFUSED[init])
    if recipe.get("peft_autocast_adapter_dtype") is False:
        found["peft_autocast_adapter_dtype"] = (False, "16 bits round SORSA's steps away; its offsets train in fp32")
    lines = [f"{name} is {_shown(value)}: {why}. Delete the line {name}." for name, (value, why) in found.items()]
    if (recipe.get("fsdp") or recipe.get("fsdp_config")) and str(_fsdp_version(recipe)) != "2":
        lines.append(f"fsdp_version is {_fsdp_version(recipe)}: FSDP1 is not supported. Set fsdp_version: 2.")
    if lines:
        raise AdapterOptionsError(f"adapter: {recipe['adapter']} cannot honour this recipe.\n" + "\n".join(lines))


def refuse_stray(recipe: Mapping[str, Any], block: Collection[str]) -> None:
    """Check that SORSA's options stand where they are read: Axolotl drops keys that it does not know.

    Args:
        recipe: an unparsed recipe with one of our adapters.
        block: the options of the sorsa block.

    Raises:
        AdapterOptionsError: some stand outside of the block, or are called sorsa_... in place of Axolotl's lora_...
    """
    lines = []
    for key in recipe:
        name = str(key).removeprefix("sorsa_")
        if name in block and key != "learning_rate":
            lines.append(f"{key} belongs into the block: `sorsa: {{{name}: ...}}`.")
        elif name != key:
            axolotls = f"lora_{name}"
            lines.append(
                f"{key} is read by nobody. {f'Write {axolotls}' if axolotls in HONOURED else 'Delete the line'}."
            )
    if lines:
        raise AdapterOptionsError(f"adapter: {recipe['adapter']} cannot honour this recipe.\n" + "\n".join(lines))


def use_the_blocks_rate(recipe: dict[str, Any]) -> None:
    """Make the learning rate that the sorsa block names the recipe's, and say so if the recipe has another.

    Args:
        recipe: an unparsed recipe with one of our adapters, changed in place.
    """
    rate, others = _look_up(recipe, f"{BLOCK}.learning_rate"), recipe.get("learning_rate")
    if rate is None:
        return
    if others is not None and str(others) != str(rate):
        say("learning_rate is %s, as the sorsa block says; %s is for other adapters.", rate, others)
    recipe["learning_rate"] = rate


def refuse_continued_preferences(recipe: Mapping[str, Any]) -> None:
    """Check a recipe that is about to train.

    Not part of the recipe's validation: `axolotl merge-lora` first validates as if it were to train, and there
    lora_model_dir is right.

    Raises:
        AdapterOptionsError: preference tuning would ignore the saved adapter.
    """
    rl = getattr(recipe.get("rl"), "value", recipe.get("rl"))
    if recipe.get("lora_model_dir") and rl in ("dpo", "ipo", "kto"):
        raise AdapterOptionsError(
            f"lora_model_dir is {recipe['lora_model_dir']!r} and Axolotl starts rl: {rl} from a new adapter, so "
            "it would be ignored. Merge it first (axolotl merge-lora), give the result as base_model, and delete "
            "the line lora_model_dir."
        )


def merge_with_peft(recipe: dict[str, Any]) -> None:
    """Make `axolotl merge-lora` merge through PEFT: its default method knows only tensors called lora_A and lora_B.

    Args:
        recipe: the unparsed recipe, changed in place.

    Raises:
        AdapterOptionsError: the recipe sets another merge_method.
    """
    if recipe.get("merge_method") not in (None, "legacy"):
        raise AdapterOptionsError(
            f"merge_method is {recipe['merge_method']!r}, which reads only LoRA's tensors; expected 'legacy'. Delete "
            "the line merge_method; where the model does not fit into memory, run: sorsa merge --base "
            f"{recipe.get('base_model')} --adapter {recipe.get('lora_model_dir') or recipe.get('output_dir')} -o merged"
        )
    recipe["merge_method"] = "legacy"


def check_config(recipe: Mapping[str, Any]) -> None:
    """Build the adapter's config as it will be built later, so that its errors come before the base model is loaded.

    Raises:
        AdapterOptionsError, SORSAConfigError: an option has a value that cannot be honoured.
    """
    said_later = {key: value for key, value in recipe.items() if key != "lora_alpha"}
    make_config(said_later, linear_names=["every_linear"], task_type="CAUSAL_LM")


def make_config(recipe: Mapping[str, Any], linear_names: list[str], task_type: str) -> SORSAConfig:
    """The adapter's config. If the recipe has lora_alpha, logs that it is not used.

    Args:
        recipe: Axolotl's configuration, validated.
        linear_names: the modules that `lora_target_linear` stands for in the model.
        task_type: PEFT's task type.

    Raises:
        AdapterOptionsError, SORSAConfigError: an option has a value that cannot be honoured.
    """
    given = {key: _plain(recipe.get(key)) for key in HONOURED}
    options = {key: value for key, value in given.items() if value not in (None, [], {})}
    if recipe.get("lora_target_linear"):
        listed = options.get("lora_target_modules", [])
        if isinstance(listed, str):
            raise AdapterOptionsError(
                f"lora_target_linear is set and lora_target_modules is the expression {listed!r}; expected a list "
                "beside lora_target_linear. Delete one of the two lines."
            )
        options["lora_target_modules"] = sorted({*listed, *linear_names})
    if not recipe.get("lora_model_dir"):
        options = _complete(options)
    own = dict(recipe.get(BLOCK) or {}) | {field: True for key, field in OWN.items() if recipe.get(key)}
    adapter = recipe["adapter"]
    config = setup_adapter({**options, "adapter": adapter, adapter: own, "task_type": task_type}).peft_config
    assert isinstance(config, SORSAConfig)
    return config


def _complete(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a new adapter, in which nothing is left for PEFT to choose: modules and rank.

    Raises:
        AdapterOptionsError: there is no rank, or nothing to adapt.
    """
    if "lora_r" not in options:
        raise AdapterOptionsError("lora_r is not set; expected the number of triplets, such as lora_r: 16.")
    if "lora_target_modules" in options:
        return options
    if "lora_target_parameters" not in options:
        raise AdapterOptionsError(
            "The recipe names nothing to adapt. Add lora_target_linear: true, or name modules in lora_target_modules."
        )
    return options | {"lora_target_modules": []}


def _look_up(recipe: Mapping[str, Any], dotted: str) -> Any:
    value: Any = recipe
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    return value


def _asks(value: Any) -> bool:
    return value is not None and value is not False and value not in ([], {}, "")


def _fsdp_version(recipe: Mapping[str, Any]) -> Any:
    return recipe.get("fsdp_version") or _look_up(recipe, "fsdp_config.fsdp_version") or 1


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(_plain(value))


def _plain(value: Any) -> Any:
    """A plain dict for Axolotl's own mapping type, which would otherwise be written into the adapter's files."""
    return dict(value) if isinstance(value, Mapping) else value
