"""A saved adapter's two files are held against one another: which layers there are, of which kinds, in which dtypes."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

import pytest
import torch
from builders.adapters import trained
from builders.llama import tiny_llama
from builders.saved import CONFIG, damaged, without
from peft import get_peft_model

from sorsa_plugin import SORSAConfig, export_lora
from sorsa_plugin.errors import IncompleteAdapterError
from sorsa_plugin.files.saved_adapter import open_tensors, read_config, survey
from sorsa_plugin.tools.inspect_adapter import inspect_adapter

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """An adapter on two projections and the embedding of both blocks; tests copy what they damage."""
    directory = tmp_path_factory.mktemp("saved")
    trained(tiny_llama(), target_modules=["embed_tokens", "up_proj", "q_proj"]).save_pretrained(directory)
    return directory


def with_options(source: Path, target: Path, drop: tuple[str, ...] = (), **options) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    known = json.loads((target / CONFIG).read_text()) | options
    (target / CONFIG).write_text(json.dumps({name: value for name, value in known.items() if name not in drop}))
    return target


def read(directory: Path) -> dict[str, int]:
    config = read_config(directory)
    with open_tensors(directory) as file:
        return survey(file, config)[0]


def test_the_config_counts_the_layers_by_layout(saved):
    assert read_config(saved).adapted_layers == {"embedding": 1, "linear": 4}
    assert len(read(saved)) == 5


LAYOUTS = {
    "null": None,
    "none": {},
    "a-linear-layer-called-embedding": {"model.embed_tokens": ["embedding"], UP: ["embedding"]},
    "of-a-layer-that-is-not-there": {"model.embed_tokens": ["embedding"], "model.layers.7.up_proj": ["weight"]},
    "a-kernel-of-another-size": {"model.embed_tokens": ["convolution", 5, 3]},
    "tied-to-nothing": {"model.embed_tokens": ["embedding"], "lm_head": ["tied", "nothing"]},
}


@pytest.mark.parametrize("command", [export_lora, lambda source, _: inspect_adapter(source)], ids=["export", "inspect"])
@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_that_the_tensors_contradict_are_refused(saved, tmp_path, layouts, command):
    edited = with_options(saved, tmp_path / "edited", lora_layouts=layouts)
    with pytest.raises(IncompleteAdapterError, match="lora_layouts"):
        command(edited, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("gone", [UP, r"up_proj", r"layers\.1\."])
def test_a_file_that_lacks_whole_layers_is_refused(saved, tmp_path, gone):
    damaged(saved, tmp_path, without(gone))
    with pytest.raises(IncompleteAdapterError, match="layers by kind"):
        read(tmp_path)


def test_an_older_adapter_without_the_count_says_which_target_has_no_layer(saved, tmp_path, caplog):
    damaged(saved, tmp_path / "damaged", without("up_proj"))
    older = with_options(tmp_path / "damaged", tmp_path / "older", drop=("adapted_layers",))
    with caplog.at_level(logging.WARNING):
        assert len(read(older)) == 3
    assert "no layer for up_proj of target_modules" in caplog.text


def test_an_older_adapter_whose_layouts_are_null_is_refused(saved, tmp_path):
    with pytest.raises(IncompleteAdapterError, match="lora_layouts is None"):
        read(with_options(saved, tmp_path, drop=("adapted_layers",), lora_layouts=None))


@pytest.mark.parametrize("part", ["dU", "V0", "fingerprint"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e5m2], ids=str)
def test_factors_that_are_no_floating_numbers_are_refused(saved, tmp_path, part, dtype):
    damaged(saved, tmp_path, lambda ts: {n: t.to(dtype) if n.endswith(part) else t for n, t in ts.items()})
    with pytest.raises(IncompleteAdapterError, match=rf"{part} is stored as .*expected float32"):
        read(tmp_path)


ENDLESS = "([a-z_0-9.]+)+#"


@pytest.mark.parametrize(
    "options",
    [{"rank_pattern": {ENDLESS: 3}}, {"target_modules": rf".*embed_tokens|{ENDLESS}"}, {"exclude_modules": ENDLESS}],
    ids=lambda options: next(iter(options)),
)
def test_a_regular_expression_that_never_ends_is_stopped(saved, tmp_path, options, monkeypatch):
    monkeypatch.setattr("sorsa_plugin.files.time_limit.SECONDS", 0.5)
    edited = with_options(saved, tmp_path, **options)
    started = time.monotonic()
    with pytest.raises(IncompleteAdapterError, match=r"a regular expression in adapter_config\.json"):
        read(edited)
    assert time.monotonic() - started < 30


def test_a_second_adapter_from_the_same_config_counts_its_own_layers():
    config = SORSAConfig(r=2, target_modules=["q_proj"])
    get_peft_model(tiny_llama(), config)
    get_peft_model(tiny_llama(layers=3), config)
    assert config.adapted_layers == {"linear": 3}
