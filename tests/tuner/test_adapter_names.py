"""Names of adapters that torch or PEFT cannot keep are refused in a sentence, and leave the model as it was."""

from __future__ import annotations

import pytest
from builders.llama import tiny_llama
from builders.models import tiny_whisper
from peft import get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import SORSAConfigError


def config(**options) -> SORSAConfig:
    return SORSAConfig(r=2, target_modules=["q_proj"], **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, f"'{name}', which is a method or attribute of torch") for name in ("train", "eval", "half", "keys")),
        *((name, f"'{name}', which is a part of the names") for name in ("sorsa_factors", "weight")),
        ("", "is ''; expected one without dots"),
        ("my.adapter", "is 'my.adapter'; expected one without dots"),
    ],
)
def test_a_name_that_cannot_be_kept_is_refused(name, message):
    base = tiny_llama()
    before = dict(base.named_modules())
    with pytest.raises(SORSAConfigError, match=message):
        get_peft_model(base, config(), adapter_name=name)
    assert dict(base.named_modules()) == before
    model = get_peft_model(base, config())
    with pytest.raises(SORSAConfigError, match=message):
        model.add_adapter(name, config())
    assert list(model.peft_config) == ["default"]


def test_names_of_layers_and_factors_are_allowed():
    model = get_peft_model(tiny_llama(), config(), adapter_name="dU")
    for name in ("q_proj", "model", "0", "base_layer"):
        model.add_adapter(name, config())
    assert list(model.peft_config) == ["dU", "q_proj", "model", "0", "base_layer"]
    assert all(not hasattr(nn.ModuleDict(), name) for name in model.peft_config)


def test_a_task_type_that_hands_whisper_tokens_is_answered_with_a_line(caplog):
    get_peft_model(tiny_whisper(), config(task_type="SEQ_2_SEQ_LM"))
    assert "passes input_ids, and WhisperForConditionalGeneration takes input_features" in caplog.text
    caplog.clear()
    get_peft_model(tiny_whisper(), config())
    assert not caplog.records
