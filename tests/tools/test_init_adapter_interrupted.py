"""An interrupted `sorsa init` leaves nothing that looks finished, and continues where it stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.forks import exit_code_of
from builders.llama import tiny_llama
from builders.saved import everything
from safetensors.torch import load_file, save_file

import sorsa_plugin.files.atomic_directory
import sorsa_plugin.tools.init_adapter
import sorsa_plugin.tuner.initialise
from sorsa_plugin import SORSAConfig, init_adapter
from sorsa_plugin.errors import OutputExistsError


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_sixth_factorisation():
    original, calls = sorsa_plugin.tuner.initialise.factorise, []

    def factorise(*args, **kwargs):
        calls.append(1)
        return die() if len(calls) == 6 else original(*args, **kwargs)

    sorsa_plugin.tuner.initialise.factorise = factorise


def between_two_tensors_of_a_layer():
    class HalfWritten(sorsa_plugin.tools.init_adapter.TensorFile):
        def write(self, name, tensor):
            super().write(name, tensor)
            if name.endswith("layers.0.mlp.up_proj.sorsa_factors.U0"):
                self.flush()
                die()

    sorsa_plugin.tools.init_adapter.TensorFile = HalfWritten


def before_the_config():
    SORSAConfig.save_pretrained = die


def before_the_tensors_take_their_name():
    Path.rename = die


def before_the_journal_goes():
    Path.unlink = die


def before_it_takes_its_name():
    sorsa_plugin.files.atomic_directory.os.replace = die


MOMENTS = {  # and the layers that are then finished
    in_the_sixth_factorisation: 5,
    between_two_tensors_of_a_layer: 5,
    before_the_config: 14,
    before_the_tensors_take_their_name: 14,
    before_the_journal_goes: 14,
    before_it_takes_its_name: 14,
}


def killed(moment, base: Path, output: Path) -> int:
    """The exit code of a process that wrote until the moment and was killed there."""

    def work() -> None:
        moment()
        init_adapter(base, output, everything(), progress=False)

    return exit_code_of(work)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_killed_it_leaves_nothing_that_looks_finished_and_continues(
    llama_files, whole, tmp_path, moment, monkeypatch, caplog
):
    output = tmp_path / "adapter"
    assert killed(moment, llama_files, output) == -signal.SIGKILL
    assert not output.exists()
    (partial,) = tmp_path.glob(".adapter.*.partial")
    assert {path.suffix for path in tmp_path.iterdir()} <= {".partial", ".lock"}
    assert partial.name.startswith(".adapter.")
    assert partial.name.endswith(".partial")
    if moment not in (before_the_journal_goes, before_it_takes_its_name):  # then it is complete
        assert not {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in partial.iterdir()}
    factorised = []
    original = sorsa_plugin.tuner.initialise.factorise
    monkeypatch.setattr(
        sorsa_plugin.tuner.initialise, "factorise", lambda *a, **k: factorised.append(k["name"]) or original(*a, **k)
    )
    report = init_adapter(llama_files, output, everything(), progress=False)
    assert report.resumed == MOMENTS[moment] == 14 - len(factorised)
    assert f"{MOMENTS[moment]} of 14 layers are done" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name


def interrupted(base, output, monkeypatch) -> None:
    """An init that an error stopped at its sixth weight."""
    original, calls = sorsa_plugin.tuner.initialise.factorise, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(sorsa_plugin.tuner.initialise, "factorise", failing)
        with pytest.raises(KeyboardInterrupt):
            init_adapter(base, output, everything(), progress=False)


def test_other_options_begin_anew(llama_files, tmp_path, monkeypatch):
    interrupted(llama_files, tmp_path / "adapter", monkeypatch)
    other = SORSAConfig(r=3, svd_seed=1, target_modules="all-linear", task_type="CAUSAL_LM")
    assert init_adapter(llama_files, tmp_path / "adapter", other, progress=False).resumed == 0


def test_a_layer_whose_weight_has_changed_meanwhile_is_done_again(whole, tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "base")
    interrupted(tmp_path / "base", tmp_path / "adapter", monkeypatch)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] *= 2
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert init_adapter(tmp_path / "base", tmp_path / "adapter", everything(), progress=False).resumed == 4
    found, before = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "adapter", whole))
    name = "base_model.model.model.layers.0.self_attn.q_proj.sorsa_factors."
    assert torch.equal(found[name + "S0"], 2 * before[name + "S0"])  # doubling is exact
    assert torch.equal(found[name + "U0"], before[name + "U0"])


def test_a_journal_cut_off_in_a_line_does_not_count_that_line(llama_files, whole, tmp_path, monkeypatch):
    interrupted(llama_files, tmp_path / "adapter", monkeypatch)
    (journal,) = tmp_path.glob(".adapter.*/layers.finished")
    journal.write_text(journal.read_text() + "model.layers.1.mlp.down_proj")
    assert init_adapter(llama_files, tmp_path / "adapter", everything(), progress=False).resumed == 5
    for path in whole.iterdir():
        assert (tmp_path / "adapter" / path.name).read_bytes() == path.read_bytes()


def test_two_writers_of_one_adapter_are_kept_apart(llama_files, tmp_path, monkeypatch):
    interrupted(llama_files, tmp_path / "adapter", monkeypatch)
    (partial,) = tmp_path.glob(".adapter.*.partial")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    command = [sys.executable, "-c", hold, str(partial.with_suffix(".lock"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(OutputExistsError, match=r"Another process is writing \S+adapter\."):
            init_adapter(llama_files, tmp_path / "adapter", everything(), progress=False)
        other.communicate(b"\n")
    assert init_adapter(llama_files, tmp_path / "adapter", everything(), progress=False).resumed == 5


def test_of_many_that_start_at_once_one_writes_the_adapter_and_the_others_stop(llama_files, tmp_path):
    """The lock is held until the output is there, so that nobody takes finished work apart."""
    start = (
        "import sys; from sorsa_plugin import SORSAConfig, init_adapter; from sorsa_plugin.errors import SORSAError\n"
        "print('ready', flush=True); input()\n"
        "try: init_adapter(sys.argv[1], sys.argv[2], SORSAConfig(r=2, target_modules='all-linear'), progress=False)\n"
        "except SORSAError as error: print(type(error).__name__)\n"
        "else: print('written')"
    )
    command = [sys.executable, "-c", start, str(llama_files), str(tmp_path / "adapter")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    ended = []
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        ended.append(process.communicate(timeout=120)[0].splitlines()[-1])
    assert sorted(ended) == ["OutputExistsError"] * 3 + ["written"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")
