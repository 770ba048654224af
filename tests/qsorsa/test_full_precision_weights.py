"""Full-precision weights that are wrong or absent are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.quantised import (
    IN,
    OUT,
    load_llama,
    quantised_base,
)
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from sorsa_plugin import SORSAConfig, quantize_residual
from sorsa_plugin.errors import BaseFilesError, BaseMismatchError
from sorsa_plugin.layers.layer import sorsa_layers

pytest.importorskip("bitsandbytes")


def plain_weight(seed: int = 0) -> torch.Tensor:
    """W of `quantised_linear` before it was quantised."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(OUT, IN, generator=generator) * IN**-0.5


def test_wrong_or_absent_full_weights_are_refused() -> None:
    config = SORSAConfig(r=4, target_modules=["proj"])
    with pytest.raises(BaseMismatchError, match=r"differs by 1\.\d+ \(relative\) from the quantised base's"):
        quantize_residual(quantised_base("nf4"), config, {"proj.weight": plain_weight(1)})
    with pytest.raises(BaseMismatchError, match=r"shape \(3, 4\) in the weights given"):
        quantize_residual(quantised_base("nf4"), config, {"proj.weight": torch.ones(3, 4)})
    with pytest.raises(BaseFilesError, match=r"have no proj\.weight; they have other and so on"):
        quantize_residual(quantised_base("nf4"), config, {"other": plain_weight()})
    with pytest.raises(BaseFilesError, match="does not say where it was loaded from"):
        quantize_residual(quantised_base("nf4"), config)


# -- whole models ----------------------------------------------------------------------------------------------------


def config(**options: Any) -> SORSAConfig:
    return SORSAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", residual_base=True, **options)


def test_a_base_stored_quantised_has_no_full_weights(llama: str, tmp_path: Path) -> None:
    load_llama(llama).save_pretrained(tmp_path)
    with pytest.raises(BaseFilesError, match="Give the model that it was quantised from"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), config())
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sorsa_layers(get_peft_model(base, config(full_precision_base=llama)))
