"""What docs/support.md says in words, each sentence beside the tests that it sums up.

A sentence whose test fails is marked in the page; one whose test is gone stops the generator, and a test of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["Works", "Differs from LoRA", "Does not work"]


@dataclass(frozen=True)
class Claim:
    """One sentence.

    Attributes:
        kind: what it is about.
        sentence: as the page has it.
        tests: regular expressions of "file::name"; every test that one of them matches from its beginning is summed up.
    """

    kind: Kind
    sentence: str
    tests: tuple[str, ...]


CLAIMS: dict[str, tuple[Claim, ...]] = {
    "kinds": (
        Claim(
            "Works",
            "Every kind in the table starts and is disabled bit for bit as the base, trains with the regularizer, is "
            "saved, loaded, merged and unmerged exactly, takes several adapters, and compiles to one graph.",
            (
                "test_kinds::test_a_new_or_disabled_adapter_gives",
                "test_kinds::test_an_optimizer_step_trains",
                "test_kinds::test_saved_and_loaded",
                "test_kinds::test_(merging_keeps|unloading_gives)",
                "test_kinds::test_a_second_adapter_adds",
                "test_compiled_kinds::test_every_layer_kind_compiles",
            ),
        ),
        Claim(
            "Works",
            "So do weights quantised by bitsandbytes (4 and 8 bits) and torchao (int8), except that merging rounds.",
            (
                "test_quantised::test_a_new_adapter_leaves",
                "test_quantised::test_disabled_the_output",
                "test_quantised::test_a_saved_adapter_gives",
                "test_quantised::test_merging_rounds_once",
                "test_quantised::test_several_adapters",
            ),
        ),
        Claim(
            "Differs from LoRA",
            "Kinds that compute with W + L R^T in the place of W (positions, grouped convolutions, attention, experts "
            "and other parameters) refuse dropout and batches of mixed adapters: the change has no input of its own.",
            ("test_kinds::test_mixed_batches_are_refused", "test_kinds::test_dropout_is_refused"),
        ),
        Claim(
            "Differs from LoRA",
            "A rank beyond a weight's sides becomes the weight's own; given for that module by name, it is an error.",
            ("test_kinds::test_a_rank_",),
        ),
        Claim(
            "Does not work",
            "Export to LoRA where LoRA would compute something else: positions, dilated and grouped convolutions, and "
            "attention. `merge_and_unload` serves these.",
            ("test_export_of_kinds::test_what_lora_computes_otherwise",),
        ),
        Claim(
            "Does not work",
            "Embeddings with `max_norm`, an attention of three input matrices as one, and linear layers quantised "
            "in other ways are refused by name.",
            (
                "test_embedding::test_an_embedding_with_max_norm",
                "test_attention::test_an_attention_with_three",
                "test_quantised_refusals::test_other_quantised",
            ),
        ),
    ),
    "architectures": (
        Claim(
            "Works",
            "Each model below goes through that whole life with PEFT's default targets for its type.",
            ("test_architectures::test_an_architecture",),
        ),
        Claim(
            "Works",
            'On models of experts, "all-linear" and names of experts select the weights that they do for LoRA.',
            ("test_experts::test_all_linear_adapts_the_same", "test_experts::test_names_of_experts_in_every_form"),
        ),
        Claim(
            "Differs from LoRA",
            "A regular expression that selects no expert keeps its exact meaning, where PEFT would widen it for LoRA.",
            ("test_experts::test_an_expression_that_selects_no_expert",),
        ),
        Claim(
            "Does not work",
            "The modules that Mamba's kernels read without calling them are refused, as for LoRA, and so are weights "
            "that are computed from other parameters.",
            ("test_layer_choice::test_modules_that_mambas", "test_layer_choice::test_a_weight_computed"),
        ),
    ),
    "life": (
        Claim(
            "Works",
            "An adapter moves between PEFT and transformers in both directions, through files and the functional API, "
            "and gives the same bits.",
            (
                "test_peft_integration::test_auto_peft_model",
                "test_peft_integration::test_transformers_add_save",
                "test_peft_integration::test_an_adapter_saved_by_peft",
                "test_peft_integration::test_the_functional_api",
            ),
        ),
        Claim(
            "Works",
            "Generation with and without cache, pipelines, beam search, and batches whose rows have adapters of their "
            "own.",
            (
                "test_loading_and_generating::test_(generation_is|beam_search|a_pipeline)",
                "test_mixed_batch::test_generate_gives",
            ),
        ),
        Claim(
            "Works",
            "Merging, unmerging, disabling, deleting and unloading leave the base model as it was, bit for bit.",
            ("test_base_model_untouched::",),
        ),
        Claim(
            "Works",
            "`modules_to_save`, trained tokens, tied embeddings, `target_parameters` and rank patterns are trained, "
            "saved, loaded and merged.",
            ("test_adapter_options::test_what_is_trained_beside", "test_ranks::test_rank_pattern"),
        ),
        Claim(
            "Works",
            "New and saved adapters on bases that accelerate offloads.",
            ("test_loading_and_generating::test_(a_new_adapter_on|a_saved_adapter)",),
        ),
        Claim("Works", "`torch.compile`, optimizer step included.", ("test_compile::",)),
        Claim(
            "Differs from LoRA",
            "A file is refused, and changes nothing, if it is incomplete, damaged, or of another base model: the "
            "factors' fingerprints are compared with the weights.",
            (
                "test_peft_integration::test_transformers_(refuses|never_runs)",
                "test_state_dict_check::test_(factors_that_are_not|a_refused|a_truncated|a_corrupted)",
            ),
        ),
        Claim(
            "Differs from LoRA",
            "An adapter that could not be made leaves the model as it was before the attempt.",
            ("test_failed_attempts::test_a_(first|further)_adapter_that_cannot",),
        ),
        Claim(
            "Does not work",
            "Other methods in the same model (`PeftMixedModel`), weighted combinations of adapters and PEFT's hot-swap "
            "helper are refused; `load_adapter` into an adapter's name swaps it.",
            (
                "test_adapter_options::test_mixing_methods",
                "test_adapter_options::test_a_weighted_combination",
                "test_adapter_options::test_hot_swapping",
                "test_adapter_options::test_loading_into_an_adapters_name",
            ),
        ),
        Claim(
            "Does not work",
            "`bias`, `use_dora`, `layer_replication` and other options of another LoRA are errors by name.",
            ("test_adapter_options::test_options_that_lora_has",),
        ),
        Claim(
            "Does not work",
            "Training on batches of mixed adapters, which LoRA does not do either.",
            ("test_mixed_batch::test_training_mode_is_refused",),
        ),
    ),
}
"""{section of the page: its sentences}"""
