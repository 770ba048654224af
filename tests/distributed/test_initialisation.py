"""New adapters where several processes share the work, and where no process, or only one, has whole weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders.engines import build_model
from builders.processes import report, run
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

LAYERS = 14


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("base")
    build_model().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def alone(saved_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    run("init_worker.py", 1, str(output), "single", saved_llama)
    assert report(output)["processes"][0]["factorised"] == LAYERS
    return output


@pytest.fixture(scope="module")
def untrained(alone: Path) -> str:
    """A complete adapter before its first step, as `sorsa init` writes one."""
    return str(alone / "untrained")


def assert_same_run(output: Path, expected: Path) -> None:
    # Three steps at a rate of 1e-2 of gradients of norm 1 at most, rounded (1e-7), and of a penalty of orthonormal
    # factors: gamma/eta 2/F P E / (1e-5 sqrt(r)), where sums in another order change E by some 1e-7: 3e-7 a step.
    assert report(output)["losses"] == pytest.approx(report(expected)["losses"], abs=5e-6)
    assert report(output)["base_checked"]
    found, wanted = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (output, expected))
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        if key.endswith(("dU", "dS", "dV")):
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-6)
        else:
            assert torch.equal(found[key], tensor), key


def test_each_process_factorises_its_share_and_all_have_the_same_bits(
    saved_llama: str, alone: Path, tmp_path: Path
) -> None:
    run("init_worker.py", 3, str(tmp_path), "ddp", saved_llama, "--steps", "1")
    processes = report(tmp_path)["processes"]
    assert [process["factorised"] for process in processes] == [5, 5, 4]
    assert {process["digest"] for process in processes} == {report(alone)["processes"][0]["digest"]}


def test_zero3_factorises_partitioned_weights_one_at_a_time(saved_llama: str, alone: Path, tmp_path: Path) -> None:
    run("init_worker.py", 2, str(tmp_path), "zero3", saved_llama)
    processes = report(tmp_path)["processes"]
    assert {process["base"] for process in processes} == {process["base_after"] for process in processes} == {"apart"}
    assert [process["factorised"] for process in processes] == [7, 7]
    assert {process["digest"] for process in processes} == {report(alone)["processes"][0]["digest"]}
    assert_same_run(tmp_path, alone)


def test_fsdp2_with_weights_on_the_first_process_only(saved_llama: str, alone: Path, tmp_path: Path) -> None:
    run("init_worker.py", 2, str(tmp_path), "fsdp2", saved_llama, "--meta")
    processes = report(tmp_path)["processes"]
    assert [process["base"] for process in processes] == ["whole", "meta"]
    assert [process["factorised"] for process in processes] == [LAYERS, 0]
    assert {process["digest"] for process in processes} == {report(alone)["processes"][0]["digest"]}
    assert_same_run(tmp_path, alone)


@pytest.mark.parametrize(("engine", "options"), [("zero3", ()), ("fsdp2", ("--meta",))])
def test_a_complete_adapter_starts_without_any_factorisation(
    engine: str, options: tuple[str, ...], saved_llama: str, alone: Path, untrained: str, tmp_path: Path
) -> None:
    run("init_worker.py", 2, str(tmp_path), engine, saved_llama, "--adapter", untrained, *options)
    assert [process["factorised"] for process in report(tmp_path)["processes"]] == [0, 0]
    assert_same_run(tmp_path, alone)


def test_zero3_refuses_an_adapter_of_another_base(untrained: str, tmp_path: Path) -> None:
    other = build_model()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.01)
    other.save_pretrained(tmp_path / "other")
    printed = run(
        "init_worker.py", 2, str(tmp_path), "zero3", str(tmp_path / "other"), "--adapter", untrained, fails=True
    )
    assert "was not trained on this base model: the fingerprint of model.layers.1.mlp.up_proj" in printed
