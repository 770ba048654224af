"""An export is whole or not there at all, and says why by name."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from builders.forks import exit_code_of_program
from builders.saved import CONFIG, FILE, damaged, renamed, reshaped, saved_adapter, without

from sorsa_plugin import SORSAError, export_lora
from sorsa_plugin.errors import ForeignAdapterError, IncompleteAdapterError, OutputExistsError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directory of a saved adapter of rank 3 on 14 layers; tests copy what they damage."""
    return saved_adapter(tmp_path_factory.mktemp("saved"))


# -- whole or not at all ---------------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
import sorsa_plugin.tools.export_lora as export
import sorsa_plugin.files.atomic_directory as outputs
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def halfway(tensors, path, **kwargs):
    path.write_bytes(bytes(1000))
    die()
{patch}
export.export_lora(sys.argv[1], sys.argv[2])
"""

MOMENTS = {
    "while-writing-tensors": "export.save_file = halfway",
    "before-the-config": "export.lora_config = die",
    "before-it-takes-its-name": "outputs.os.replace = die",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_export_leaves_nothing_that_looks_like_an_adapter_and_can_be_repeated(saved, tmp_path, moment):
    output = tmp_path / "lora"
    program = KILLED.format(patch=MOMENTS[moment])
    assert exit_code_of_program(program, saved, output) == -signal.SIGKILL
    assert not output.exists()
    left = list(tmp_path.iterdir())
    assert left, "it was killed before it wrote anything"
    assert all(path.name.startswith(".lora.") and path.name.endswith(".partial") for path in left)
    if moment != "before-it-takes-its-name":  # then it is complete
        assert not list(tmp_path.rglob(CONFIG))
    assert export_lora(saved, output).rank == 6
    assert (output / CONFIG).exists()


def test_an_export_that_fails_midway_leaves_nothing(saved, tmp_path):
    source = tmp_path / "sorsa"
    damaged(
        saved,
        source,
        lambda tensors: {n: t * float("nan") if "layers.1.mlp.up_proj" in n else t for n, t in tensors.items()},
    )
    with pytest.raises(IncompleteAdapterError, match=r"layers\.1\.mlp\.up_proj hold NaN or infinity"):
        export_lora(source, tmp_path / "lora")
    assert [path.name for path in tmp_path.iterdir()] == ["sorsa"]


def test_an_output_that_is_in_use_is_refused_and_left_alone(saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    for name, message in (("file", "is a file"), ("full", "is not empty")):
        with pytest.raises(OutputExistsError, match=rf"{name} {message}; expected a new or empty directory"):
            export_lora(saved, tmp_path / name)
    with pytest.raises(OutputExistsError):
        export_lora(saved, saved)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "notes").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "full"}


def test_a_mount_point_is_refused_before_the_work_that_could_not_take_its_place(saved, tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "volume")
    monkeypatch.setattr("sorsa_plugin.tools.export_lora.open_tensors", lambda _: pytest.fail("work was begun"))
    with pytest.raises(OutputExistsError, match="volume is a mount point"):
        export_lora(saved, tmp_path / "volume")
    monkeypatch.undo()
    export_lora(saved, tmp_path / "volume" / "lora")


def test_an_empty_output_is_used_and_missing_parents_are_made(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "a" / "b" / "lora"):
        export_lora(saved, output)
        assert (output / FILE).exists()
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "a"}


# -- damaged and foreign adapters ------------------------------------------------------------------------------------


LAYER = r"layers\.1\.mlp\.up_proj"

DAMAGES = {
    **{f"without-{part}": (without(rf"{LAYER}\..*\.{part}$"), IncompleteAdapterError, rf"lacks {part} of .*{LAYER}")
       for part in ("dU", "dS", "dV", "U0", "S0", "V0", "fingerprint")},
    **{f"other-shape-of-{part}": (reshaped(rf"{LAYER}\..*\.{part}$"), IncompleteAdapterError, rf"{LAYER}.* has shape")
       for part in ("dU", "dS", "V0", "fingerprint")},
    "another-method": (renamed("sorsa_factors.", "lora_A."), ForeignAdapterError, r"lora_A.*0 SORSA layers"),
    "another-method-too": (lambda t: {**t, "base_model.model.x.lora_A.weight": torch.ones(2)}, ForeignAdapterError,
                           r"holds base_model\.model\.x\.lora_A\.weight, and factors of 14"),
    "an-unknown-part": (lambda t: {**t, "base_model.model.x.sorsa_factors.dW": torch.ones(2)}, ForeignAdapterError,
                        r"sorsa_factors\.dW"),
    "other-names": (renamed("base_model.model.", "transformer."), ForeignAdapterError, r"holds transformer\."),
    "no-tensors": (lambda t: {}, ForeignAdapterError, r"holds no tensor"),
    "a-scalar": (lambda t: {n: torch.ones(()) if n.endswith("up_proj.sorsa_factors.U0") else x for n, x in t.items()},
                 IncompleteAdapterError, r"up_proj.* has shape"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_tensors_are_refused_by_name_before_anything_is_written(saved, tmp_path, change, error, message):
    damaged(saved, tmp_path / "sorsa", change)
    with pytest.raises(error, match=message) as caught:
        export_lora(tmp_path / "sorsa", tmp_path / "lora")
    assert isinstance(caught.value, SORSAError)
    assert [path.name for path in tmp_path.iterdir()] == ["sorsa"]


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved, tmp_path, keep):
    shutil.copytree(saved, tmp_path / "sorsa")
    content = (saved / FILE).read_bytes()
    (tmp_path / "sorsa" / FILE).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(IncompleteAdapterError, match=r"cannot be read .*take it from the original run again"):
        export_lora(tmp_path / "sorsa", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


CONFIGS = {
    "garbage": ("{not json", IncompleteAdapterError, "cannot be read as an adapter's configuration"),
    "empty": ("", IncompleteAdapterError, "cannot be read as an adapter's configuration"),
    "a-list": ("[1]", IncompleteAdapterError, "cannot be read as an adapter's configuration"),
    "no-type": ("{}", IncompleteAdapterError, "cannot be read as an adapter's configuration"),
    "lora": ({"peft_type": "LORA"}, ForeignAdapterError, "peft_type 'LORA'; expected 'SORSA'"),
    "another-rank": ({"r": 4}, IncompleteAdapterError, r"has shape \(32, 3\).*expected \(32, 4\)"),
    "no-rank": ({"r": 0}, SORSAError, "r is 0; expected an integer >= 1"),
    "other-targets": ({"target_modules": ["fc1"]}, IncompleteAdapterError, "target_modules .* does not select"),
    "modules-missing": ({"modules_to_save": ["lm_head"]}, IncompleteAdapterError, "no tensors for modules_to_save"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "error", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_damaged_or_foreign_config_is_refused(saved, tmp_path, content, error, message):
    shutil.copytree(saved, tmp_path / "sorsa")
    path = tmp_path / "sorsa" / CONFIG
    path.write_text(content if isinstance(content, str) else json.dumps({**json.loads(path.read_text()), **content}))
    with pytest.raises(error, match=message):
        export_lora(tmp_path / "sorsa", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_directories_without_an_adapter_are_refused(saved, tmp_path):
    for source in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ForeignAdapterError, match=r"holds no adapter_config\.json"):
            export_lora(source, tmp_path / "lora")
    shutil.copytree(saved, tmp_path / "sorsa")
    (tmp_path / "sorsa" / FILE).rename(tmp_path / "sorsa" / "adapter_model.bin")
    with pytest.raises(IncompleteAdapterError, match=r"holds adapter_model\.bin; expected adapter_model\.safetensors"):
        export_lora(tmp_path / "sorsa", tmp_path / "lora")
