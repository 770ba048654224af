"""An analysis of whole runs: the numbers of an independent float64 computation, in tables, files and charts."""

from __future__ import annotations

import csv
import json
import math
import sys

import numpy as np
import pytest
import torch
from builders.adapters import perturb
from builders.llama import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_plugin import SORSAConfig, analyze
from sorsa_plugin.errors import (
    DecompositionError,
    ForeignAdapterError,
    MissingPackageError,
    RankError,
    SORSAConfigError,
)

TARGETS = ["q_proj", "k_proj", "up_proj"]


def merged_models(runs, run, step):
    """Base and trained model, loaded whole."""
    path = runs / run / f"checkpoint-{step}"
    if run == "full":
        return tiny_llama(), type(tiny_llama()).from_pretrained(path)
    return tiny_llama(), PeftModel.from_pretrained(tiny_llama(), path).merge_and_unload()


def test_every_number_is_that_of_numpy_in_float64(runs, analysis):
    assert analysis.runs == ("sorsa", "lora", "full")
    assert len(analysis.changes) == 3 * 2 * 6
    for run in analysis.runs:
        for step in (2, 4):
            base, merged = merged_models(runs, run, step)
            found = {c.module: c for c in analysis.changes if (c.run, c.step) == (run, step)}
            assert {name.rpartition(".")[2] for name in found} == set(TARGETS)
            for name, change in found.items():
                before, after = (model.get_submodule(name).weight.detach().double().numpy() for model in (base, merged))
                U0, S0, V0 = np.linalg.svd(before, full_matrices=False)
                Ut, St, Vt = np.linalg.svd(after, full_matrices=False)
                cosines = np.abs((U0 * Ut).sum(0)) + np.abs((V0 * Vt).sum(1))
                # the merged weight is the same up to one fp32 rounding per entry, e = 2^-24 ||W||_F in all: singular
                # values move by e at most, vectors by about e over the smallest gap
                rounding = 2.0**-23 * np.linalg.norm(after)
                gap = min(-np.diff(S0).max(), -np.diff(St).max())
                assert change.d_sigma == pytest.approx(np.abs(St - S0).mean(), abs=rounding)
                assert change.d_direction == pytest.approx(1 - cosines.mean() / 2, abs=4 * rounding / gap)
                assert change.relative_change == pytest.approx(
                    np.linalg.norm(after - before) / np.linalg.norm(before), abs=2.0**-22
                )
                assert change.condition_before == pytest.approx(S0[0] / S0[-1], rel=1e-9)
                assert change.condition_after == pytest.approx(St[0] / St[-1], rel=2 * rounding / St[-1])
                assert (change.out_features, change.in_features) == before.shape
                assert change.triplets == len(S0)
                if step == 4:
                    np.testing.assert_allclose(analysis.spectra[name][run], St, atol=rounding)
                    np.testing.assert_allclose(analysis.spectra[name]["pre-trained"], S0, atol=1e-12)


def test_training_moves_the_weights_and_steps_are_in_order(analysis):
    summaries = analysis.summaries()
    assert [(s.run, s.step) for s in summaries] == [(run, step) for run in analysis.runs for step in (2, 4)]
    for summary in summaries:
        changes = [c for c in analysis.changes if (c.run, c.step) == (summary.run, summary.step)]
        assert summary.layers == len(changes) == 6
        assert summary.d_sigma == pytest.approx(np.mean([c.d_sigma for c in changes]))
        assert summary.d_direction == pytest.approx(np.mean([c.d_direction for c in changes]))
        assert min(summary.d_sigma, summary.d_direction) > 0
        logs = [math.log(c.condition_after) for c in changes]
        assert summary.condition_after == pytest.approx(math.exp(np.mean(logs)))
    assert [s.principal_condition_before is None for s in summaries] == [False, False, True, True, True, True]
    assert [s.principal_condition_after is None for s in summaries] == [False, False, False, False, True, True]
    assert [c.step for c in analysis.last("sorsa")] == [4] * 6
    assert {(c.kind, c.depth) for c in analysis.changes} == {(kind, depth) for kind in TARGETS for depth in (0, 1)}


def test_an_untrained_adapter_has_not_moved_at_all(runs, tmp_path):
    model = get_peft_model(tiny_llama(), SORSAConfig(r=3, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    found = analyze(runs / "base", [tmp_path / "adapter"], progress=False)
    assert len(found.changes) == 14
    for change in found.changes:
        assert change.d_sigma == change.d_direction == change.relative_change == 0
        assert change.condition_after == change.condition_before
        assert change.principal_condition_after == pytest.approx(change.principal_condition_before)


def test_a_bfloat16_base_and_its_untrained_pissa_differ_by_rounding_only(tmp_path):
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=3, init_lora_weights="pissa", target_modules=TARGETS)
    get_peft_model(tiny_llama(torch.bfloat16).float(), config).save_pretrained(tmp_path / "adapter")
    for change in analyze(tmp_path / "base", [tmp_path / "adapter"], progress=False).changes:
        assert change.relative_change < 8 * 2.0**-24  # the residual is formed and added back in fp32
        assert change.d_direction < 1e-6


def test_modules_and_triplets_can_be_chosen(runs, analysis):
    found = analyze(
        runs / "base", [runs / "sorsa" / "checkpoint-4"], modules=r"layers\.1\..*(q|k)_proj", top=5, progress=False
    )
    assert [c.module for c in found.changes] == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]
    assert found.runs == ("sorsa/checkpoint-4",)
    for change in found.changes:
        assert change.triplets == 5
        before, after = (np.array(found.spectra[change.module][name]) for name in ("pre-trained", found.runs[0]))
        assert change.d_sigma == pytest.approx(np.abs(after - before)[:5].mean())
        (whole,) = (c for c in analysis.last("sorsa") if c.module == change.module)
        assert change.condition_after == pytest.approx(whole.condition_after, rel=1e-6)


def test_whole_models_alone_are_compared_in_every_linear_layer(runs):
    found = analyze(runs / "base", [runs / "full" / "checkpoint-4", runs / "full" / "checkpoint-2"], progress=False)
    assert found.runs == ("full/checkpoint-4", "full/checkpoint-2")
    assert len(found.changes) == 2 * 14


def test_the_files_hold_the_same_numbers(analysis, tmp_path):
    analysis.save(tmp_path)
    with (tmp_path / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["d_direction"]) for row in rows] == [c.d_direction for c in analysis.changes]
    assert {row["principal_condition_after"] for row in rows if row["run"] == "full"} == {""}
    with (tmp_path / "summary.csv").open() as file:
        assert [float(row["d_sigma"]) for row in csv.DictReader(file)] == [s.d_sigma for s in analysis.summaries()]
    content = json.loads((tmp_path / "analysis.json").read_text())
    assert content["changes"][3]["d_sigma"] == analysis.changes[3].d_sigma
    assert content["spectra"] == analysis.spectra
    assert len(content["summary"]) == 6


def test_an_infinite_condition_number_is_null_in_json(runs, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:, 0] = 0
        model.model.layers[0].self_attn.q_proj.weight[0] = 0
    model.save_pretrained(tmp_path / "flat")
    found = analyze(runs / "base", [tmp_path / "flat"], modules="layers.0.*q_proj", progress=False)
    assert found.changes[0].condition_after == math.inf
    found.save(tmp_path)
    assert json.loads((tmp_path / "analysis.json").read_text())["changes"][0]["condition_after"] is None


def test_what_cannot_be_compared_is_a_sentence(runs, tmp_path):
    adapter = runs / "sorsa" / "checkpoint-4"
    with pytest.raises(SORSAConfigError, match="Nothing to compare with the base"):
        analyze(runs / "base")
    with pytest.raises(ForeignAdapterError, match="No trained module has a name that contains 'nope'"):
        analyze(runs / "base", [adapter], modules="nope")
    with pytest.raises(SORSAConfigError, match=r"modules is '\(', which is no regular expression"):
        analyze(runs / "base", [adapter], modules="(")
    with pytest.raises(SORSAConfigError, match="degenerate is -1"):
        analyze(runs / "base", [adapter], degenerate=-1)
    with pytest.raises(RankError, match="top is 0"):
        analyze(runs / "base", [adapter], top=0, progress=False)


@pytest.mark.parametrize("kind", [LoraConfig, SORSAConfig])
def test_a_diverged_adapter_is_named_by_its_first_layer(runs, tmp_path, kind):
    model = get_peft_model(tiny_llama(), kind(r=3, target_modules=["up_proj"]))
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(DecompositionError, match=r"layers\.0\.mlp\.up_proj of adapter holds NaN or infinity"):
        analyze(runs / "base", [tmp_path / "adapter"], progress=False)


def test_trained_vectors_are_left_out(runs, tmp_path):
    config = SORSAConfig(r=3, target_modules=["up_proj"], modules_to_save=["norm", "lm_head"])
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    found = analyze(runs / "base", [tmp_path / "adapter"], progress=False)
    assert set(found.spectra) == {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"}


def command(*arguments):
    return CliRunner().invoke(build_app(), ["analyze", *map(str, arguments)])


def test_the_command_writes_tables_and_charts(runs, tmp_path):
    output, adapter = tmp_path / "analysis", runs / "lora" / "checkpoint-4"
    done = command("--base", runs / "base", "--checkpoints", runs / "sorsa", "--adapter", adapter, "-o", output)
    assert done.exit_code == 0, done.output
    assert "sorsa" in done.output
    charts = {f"{name}.{kind}" for name in ("change", "layers", "spectra", "conditions") for kind in ("png", "svg")}
    assert {path.name for path in output.iterdir()} == charts | {"layers.csv", "summary.csv", "analysis.json"}
    for path in output.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    text = (output / "change.svg").read_text()
    for expected in ("Singular values against vectors", "optimizer step", "sorsa", "lora/checkpoint-4"):
        assert expected in text
    assert "model.layers" not in (output / "spectra.svg").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"analysis"}
    again = command("--base", runs / "base", "--adapter", runs / "lora" / "checkpoint-4", "-o", output)
    assert again.exit_code == 1
    assert "is not empty" in again.output


def test_one_adapter_with_one_layer_can_be_drawn(runs, tmp_path):
    model = get_peft_model(tiny_llama(), SORSAConfig(r=3, target_modules=["lm_head"]))
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    done = command("--base", runs / "base", "--adapter", tmp_path / "adapter", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "conditions.png").exists()


def test_without_matplotlib_a_sentence_comes_before_the_work(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["--base", runs / "base", "--adapter", runs / "lora" / "checkpoint-4", "-o", tmp_path / "out"]
    done = command(*arguments)
    assert done.exit_code == 1
    assert 'pip install "sorsa-plugin[plot]"' in done.output
    assert not (tmp_path / "out").exists()
    assert issubclass(MissingPackageError, ImportError)
    assert command(*arguments, "--no-plots").exit_code == 0
