"""`sorsa advise` reads a config alone, and says what its rates rest on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_plugin.errors import SORSAConfigError
from sorsa_plugin.learning_rate import suggested_rate
from sorsa_plugin.tools.advise import advise


def config_only(directory: Path, **options: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(options or {"model_type": "llama", "hidden_size": 576}))
    return directory


def run(*arguments: object) -> str:
    done = CliRunner().invoke(build_app(), ["advise", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_says_rates_gamma_a_healthy_gap_and_what_they_rest_on(tmp_path):
    page = run("--model", config_only(tmp_path), "-r", 16)
    assert "width 576, rank 16" in page
    assert "start from learning rate: 0.0009\nsweep: 0.0003, 0.0009, 0.003\n" in page
    assert "interpolated between width 128, rank 64 (measured, benchmarks/results/quickstart_rank.json)" in page
    assert "gamma: 0.0004, the default. The regularizer's loss weighs gamma / rate: 1.3, 0.44, 0.13" in page
    assert "sorsa/gap_mean up to 0.6" in page
    assert "LoRA" not in page


def test_a_rate_of_lora_is_translated_with_its_caveat(tmp_path):
    page = run("--model", config_only(tmp_path), "-r", 16, "--lora-lr", "1e-3")
    assert "if LoRA's best rate here is 0.001, and not just its usual one: 0.0002 (extrapolated" in page


def test_json_has_all_of_it(tmp_path):
    content = json.loads(run("--model", config_only(tmp_path), "-r", 16, "--lora-lr", "1e-3", "--json"))
    suggested = suggested_rate(576, 16)
    assert content["learning_rate"]["rate"] == suggested.rate
    assert content["learning_rate"]["sweep"] == list(suggested.sweep)
    assert content["loss_weights"] == pytest.approx([4e-4 / rate for rate in suggested.sweep])
    assert (content["width"], content["rank"], content["rate_from_lora"]) == (576, 16, 2e-4)


def test_the_width_is_that_of_the_language_model(tmp_path):
    gpt2 = config_only(tmp_path / "gpt2", model_type="gpt2", n_embd=32)
    assert advise(gpt2, 4).width == 32
    text = {"model_type": "llama", "hidden_size": 64}
    assert advise(config_only(tmp_path / "llava", model_type="llava", text_config=text), 4).width == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-r", "0"], "rank is 0; expected a number above 0"),
        (["-r", "8", "--lora-lr", "-1"], "lora_learning_rate is -1.0; expected a number above 0"),
    ],
)
def test_what_cannot_be_advised_is_a_sentence(arguments, message, tmp_path):
    done = CliRunner().invoke(build_app(), ["advise", "--model", str(config_only(tmp_path)), *arguments])
    assert done.exit_code == 1
    assert message in done.output
    assert "gives no model config" in CliRunner().invoke(build_app(), ["advise", "--model", "/no", "-r", "8"]).output


def test_a_model_without_a_width_is_a_sentence(tmp_path):
    with pytest.raises(SORSAConfigError, match="has no hidden_size, on which the advice rests"):
        advise(config_only(tmp_path, model_type="resnet"), 4)
