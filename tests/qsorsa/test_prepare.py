"""`sorsa init --quantize` writes what quantize_residual makes in Python, bit for bit, complete or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import assert_same_tensors, perturb
from builders.quantised import base_tensors, save_llama
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_plugin import SORSAConfig, init_residual, quantize_residual
from sorsa_plugin.errors import BaseFilesError, BaseMismatchError, OutputExistsError, SORSAConfigError, SORSAError
from sorsa_plugin.qsorsa.prepare import FORMATS

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(save_llama(tmp_path_factory.mktemp("llama")))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def config(**options: Any) -> SORSAConfig:
    return SORSAConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)


def init(*arguments: Any) -> Any:
    return CliRunner().invoke(build_app(), ["init", *map(str, arguments)])


@pytest.mark.parametrize("quantize", FORMATS)
def test_what_the_command_writes_is_what_quantize_residual_makes(
    quantize: str, llama: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    output = tmp_path / "residual"
    result = init("--model", llama, "-o", output, "-r", 4, "--quantize", quantize)
    assert result.exit_code == 0, result.output
    assert f"Quantised residual model ({quantize}) and adapter of 14 layers" in result.stdout
    quantised = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=BitsAndBytesConfig(**FORMATS[quantize]), dtype=torch.bfloat16
    )
    python = quantize_residual(quantised, config())
    base = AutoModelForCausalLM.from_pretrained(output)
    loaded = PeftModel.from_pretrained(base, output / "adapter", is_trainable=True)
    assert_same_tensors(base_tensors(loaded), base_tensors(python))
    python.save_pretrained(tmp_path / "python")
    ours, pythons = (load_file(d / "adapter_model.safetensors") for d in (output / "adapter", tmp_path / "python"))
    assert_same_tensors(ours, pythons)
    perturb(loaded)
    perturb(python)
    assert torch.equal(loaded.eval()(tokens).logits, python.eval()(tokens).logits)
    assert (output / "tokenizer.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"residual", "python"}


def test_the_untrained_adapter_trains(llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    report = init_residual(llama, tmp_path / "residual", config())
    base = AutoModelForCausalLM.from_pretrained(report.output, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, report.adapter, is_trainable=True).train()
    assert model.get_nb_trainable_parameters()[0] == report.trainable_parameters
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_report_says_what_the_triplets_save(llama: Path, tmp_path: Path) -> None:
    report = init_residual(llama, tmp_path / "residual", config(r=16))
    plain, residual = report.rounding
    assert residual < plain
    written = list(report.output.rglob("*.safetensors"))
    assert report.bytes == sum(path.stat().st_size for path in written)
    assert {path.parent.name for path in written} == {"residual", "adapter"}
    assert json.loads((report.adapter / "adapter_config.json").read_text())["full_precision_base"] == str(llama)


def test_modules_to_save_and_a_shard_per_layer(llama: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    for base in (llama, sharded):
        init_residual(base, tmp_path / base.name[:3], config(modules_to_save=["lm_head"]))
    one, many = (
        load_file(tmp_path / base.name[:3] / "adapter" / "adapter_model.safetensors") for base in (llama, sharded)
    )
    assert any("lm_head" in name for name in one)
    assert_same_tensors(many, one)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"quantize": "int3"}, SORSAConfigError, "quantize is 'int3'; expected one of 'nf4', 'fp4', 'int8'"),
        ({"base": "nowhere"}, BaseFilesError, "nowhere"),
        ({"target_modules": ["lm_head"]}, BaseMismatchError, r"lm_head \(Linear\) is not quantised"),
        ({"target_modules": ["nothing"]}, SORSAConfigError, "PEFT refuses these options"),
        ({"init_weights": False}, SORSAConfigError, "init_weights=False"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is(
    changes: dict[str, Any], error: type[SORSAError], sentence: str, llama: Path, tmp_path: Path
) -> None:
    base, quantize = changes.pop("base", llama), changes.pop("quantize", "nf4")
    with pytest.raises(error, match=sentence):
        init_residual(base, tmp_path / "residual", config(**changes), quantize=quantize)
    assert not list(tmp_path.iterdir())


def test_a_quantised_base_and_an_occupied_output_are_refused(llama: Path, tmp_path: Path) -> None:
    report = init_residual(llama, tmp_path / "residual", config())
    result = init("--model", report.output, "-o", tmp_path / "again", "--quantize", "nf4")
    assert result.exit_code == 1
    assert "Give the model that it was quantised from" in result.stderr
    with pytest.raises(OutputExistsError):
        init_residual(llama, report.output, config())


def test_interrupted_while_writing_it_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def interrupt(model: Any, directory: str, **_: Any) -> None:
        written.extend(path.name for path in Path(directory).parent.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(PeftModel, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        init_residual(llama, tmp_path / "residual", config())
    assert "model.safetensors" in written
    assert not list(tmp_path.iterdir())
