"""An output layer tied to an adapted embedding shares its factors and its adapters."""

from __future__ import annotations

import pytest
import torch
from builders.adapters import assert_same_tensors, perturb, snapshot
from builders.llama import tied_llama
from peft import PeftModel, get_peft_model

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import FoldError, UnsupportedLayerError
from sorsa_plugin.layers.layer import sorsa_layers

ATOL = 2e-6
"""fp32 logits of order 1 or less after two layers of sums over at most 48 terms, in two orders."""


def train(model: PeftModel, tokens: torch.Tensor, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_a_tied_output_layer_shares_the_embeddings_factors_and_stays_tied_when_merged(tokens):
    model = get_peft_model(tied_llama(), SORSAConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True))
    perturb(model)
    before = snapshot(model)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert len(sorsa_layers(model)) == 2
    torch.testing.assert_close(output.get_delta_weight("default"), embedding.get_delta_weight("default"))
    assert sum(p.requires_grad for p in model.parameters()) == 3
    with torch.no_grad():
        logits = model(tokens).logits
        model.merge_adapter()
        assert output.weight is embedding.weight
        torch.testing.assert_close(model(tokens).logits, logits, rtol=0, atol=ATOL)
        model.unmerge_adapter()
    assert output.weight is embedding.weight
    assert_same_tensors(snapshot(model), before)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings


def test_a_tied_output_layer_is_not_folded_by_itself():
    """Its weight is the embedding's, which every reader of it would find folded."""
    options = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    model = get_peft_model(tied_llama(), SORSAConfig(r=2, **options))
    for layer in sorsa_layers(model):
        with pytest.raises(FoldError, match="no folded form"):
            layer.fold()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Model with")
def test_a_second_adapter_is_tied_as_the_first_is(options, tokens, tmp_path):
    logits = {}
    for name, steps in (("one", 1), ("two", 2)):
        model = get_peft_model(tied_llama(), SORSAConfig(r=2, ensure_weight_tying=True, **options), adapter_name=name)
        train(model, tokens, steps)
        with torch.no_grad():
            logits[name] = model(tokens).logits
        model.save_pretrained(tmp_path)
    both = PeftModel.from_pretrained(tied_llama(), tmp_path / "one", adapter_name="one").eval()
    both.load_adapter(tmp_path / "two", "two")
    for name, expected in logits.items():
        both.set_adapter(name)
        with torch.no_grad():
            assert torch.equal(both(tokens).logits, expected)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:(Model with|Model has)")
def test_an_output_layer_is_tied_by_all_adapters_or_by_none(first):
    options = {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}
    model = get_peft_model(tied_llama(), SORSAConfig(**options, ensure_weight_tying=first))
    with pytest.raises(UnsupportedLayerError, match=r"lm_head is .*the same ensure_weight_tying"):
        model.add_adapter("second", SORSAConfig(**options, ensure_weight_tying=not first))


def test_tied_layers_need_an_adapted_embedding(refused):
    model = tied_llama()
    model.lm_head = torch.nn.Conv1d(32, 64, 1, bias=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    with refused(UnsupportedLayerError, "lm_head of type Conv1d is tied to an embedding"):
        get_peft_model(model, SORSAConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True))


def test_an_adapter_added_in_eval_mode_drops_nothing_on_either_layer(tokens):
    options = {"r": 2, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    model = get_peft_model(tied_llama(), SORSAConfig(**options))
    model.eval()
    model.add_adapter("second", SORSAConfig(**options, sorsa_dropout=0.5))
    assert not any(layer.sorsa_dropout["second"].training for layer in sorsa_layers(model))
    model.set_adapter("second")
    perturb(model, "second")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_a_tied_layer_counts_as_adapted_by_its_name(caplog):
    get_peft_model(tied_llama(), SORSAConfig(r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True))
    assert "is adapted" not in caplog.text
