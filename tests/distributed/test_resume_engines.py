"""Checkpoints of every engine: resumed as if uninterrupted, on as many processes or another number; a killed one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from subprocess import run as run_command

import pytest
import torch
from builders.processes import environment, report, run
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

CASES = {
    "ddp": ("ddp",),
    "fsdp2-full": ("fsdp2", "--state-dict", "FULL_STATE_DICT", "--update", "decoupled"),
    "fsdp2-sharded": ("fsdp2", "--state-dict", "SHARDED_STATE_DICT"),
    "zero2-bf16": ("zero2", "--bf16"),
    "zero3": ("zero3", "--update", "decoupled"),
}
STEPS = 9
"""With checkpoints at 3, 6 and 9."""


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def train(output: Path, processes: int, *options: str, steps: int = STEPS) -> dict:
    run("resume_worker.py", processes, str(output), *options, "--steps", str(steps))
    return report(output)


def resume(source: Path, step: int, output: Path, processes: int, *options: str, steps: int = STEPS) -> dict:
    """Go on from another run's checkpoint."""
    name = f"checkpoint-{step}"
    shutil.copytree(source / "run" / name, output / "run" / name)
    if "--universal" in options:
        make_universal(output / "run" / name / f"global_step{step}")
    found = train(output, processes, *options, "--resume", steps=steps)
    assert found["resumed_from"].endswith(name)
    return found


def make_universal(partitions: Path) -> None:
    """What docs/distributed.md says."""
    folders = ["--input_folder", str(partitions), "--output_folder", f"{partitions}_universal"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, *workers]
    done = run_command(
        [*command, "--inject_missing_state"], env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module", params=CASES)
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Name and output of a run on two processes that nothing interrupted."""
    output = tmp_path_factory.mktemp(request.param)
    train(output, 2, *CASES[request.param])
    return request.param, output


def test_a_resumed_run_goes_on_as_if_uninterrupted(straight: tuple[str, Path], tmp_path: Path) -> None:
    case, output = straight
    resumed = resume(output, 6, tmp_path, 2, *CASES[case])
    assert resumed["losses"] == report(output)["losses"]
    found, expected = tensors(tmp_path / "adapter"), tensors(output / "adapter")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_run_resumes_on_fewer_and_on_more_processes(straight: tuple[str, Path], tmp_path: Path) -> None:
    case, output = straight
    options = (*CASES[case], *(["--universal"] if case.startswith("zero") else []))
    resume(output, 3, tmp_path / "one", 1, *options, steps=6)
    more = 4 if case == "fsdp2-sharded" else 2
    resumed = resume(tmp_path / "one", 6, tmp_path / "more", more, *options)
    rounded = "--bf16" in options
    assert resumed["losses"] == pytest.approx(report(output)["losses"], abs=2.0**-6 if rounded else 5e-6)
    found, expected = tensors(tmp_path / "more" / "adapter"), tensors(output / "adapter")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        # Six steps summed in another order, see test_engines.py. A bf16 gradient differs by 2^-7 of itself when its
        # sums are split otherwise: six steps of 1e-2 of gradients clipped to 0.02; and the saved bf16 copies of offsets
        # that differ at all may be neighbours, which are 2^-7 of themselves apart.
        atol, rtol = (1e-5, 2.0**-7) if rounded else (2e-6, 0.0)
        torch.testing.assert_close(found[key], tensor, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def test_deepspeed_refuses_another_number_of_processes_without_its_universal_format(
    straight: tuple[str, Path], tmp_path: Path
) -> None:
    case, output = straight
    if case != "zero3":
        pytest.skip("one stage is enough: the sentence is the same")
    shutil.copytree(output / "run" / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    printed = run("resume_worker.py", 1, str(tmp_path), *CASES[case], "--resume", fails=True)
    assert "used a DP world size of 2 but the current world size is 1" in printed


def test_a_checkpoint_is_converted_to_the_adapter_that_the_run_saved(
    straight: tuple[str, Path], tmp_path: Path
) -> None:
    from sorsa_plugin.errors import ForeignAdapterError
    from sorsa_transformers import convert_checkpoint

    case, output = straight
    checkpoint = output / "run" / f"checkpoint-{STEPS}"
    expected = tensors(output / "adapter")
    if case in ("ddp", "fsdp2-full"):
        found = tensors(checkpoint)
        with pytest.raises(ForeignAdapterError, match="complete adapter already"):
            convert_checkpoint(checkpoint, tmp_path / "converted")
    else:
        assert convert_checkpoint(checkpoint, tmp_path / "converted").layers == 14
        found = tensors(tmp_path / "converted")
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        loads_on_one_process(tmp_path / "converted", output / "adapter", rounded=case == "zero2-bf16")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():  # bf16 where DeepSpeed saved its copies: the masters round to them
        assert torch.equal(found[key].to(tensor.dtype), tensor), key


def loads_on_one_process(converted: Path, saved: Path, rounded: bool) -> None:
    from builders.engines import build_model
    from peft import PeftModel

    tokens = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(7))
    logits = [PeftModel.from_pretrained(build_model(), path).eval()(tokens).logits for path in (converted, saved)]
    # the offsets' rounding to bf16 is 2^-8 of a change that moves logits of 0.1 by as much at most
    torch.testing.assert_close(*logits, rtol=0, atol=2.0**-8 if rounded else 0)


def test_pieces_that_are_absent_or_damaged_are_refused_and_nothing_is_written(
    straight: tuple[str, Path], tmp_path: Path
) -> None:
    from sorsa_plugin.errors import IncompleteAdapterError
    from sorsa_transformers import convert_checkpoint

    case, output = straight
    if case in ("ddp", "fsdp2-full"):
        pytest.skip("no pieces")
    pieces = sorted(
        (output / "run" / f"checkpoint-{STEPS}").rglob("*.distcp" if "fsdp" in case else "*optim_states.pt")
    )
    pieces = [piece for piece in pieces if "optimizer_0" not in piece.parts]
    for harm in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:1000])):
        copy = tmp_path / "copy"
        shutil.copytree(output / "run" / f"checkpoint-{STEPS}", copy)
        harm(copy / pieces[-1].relative_to(output / "run" / f"checkpoint-{STEPS}"))
        with pytest.raises(IncompleteAdapterError, match="cannot be read"):
            convert_checkpoint(copy, tmp_path / "converted")
        assert not (tmp_path / "converted").exists()
        shutil.rmtree(copy)


def test_a_killed_process_ends_the_run_and_the_last_complete_checkpoint_resumes(tmp_path: Path) -> None:
    train(tmp_path / "straight", 2, "fsdp2", steps=6)
    run("resume_worker.py", 2, str(tmp_path / "killed"), "fsdp2", "--steps", "6", "--die-at", "4", fails=True)
    torn = tmp_path / "killed" / "run" / "checkpoint-5"  # as if the process had died while saving, too
    shutil.copytree(tmp_path / "killed" / "run" / "checkpoint-3", torn)
    (torn / "trainer_state.json").unlink()
    resumed = train(tmp_path / "killed", 2, "fsdp2", "--resume", steps=6)
    assert resumed["resumed_from"].endswith("checkpoint-3")
    expected, found = tensors(tmp_path / "straight" / "adapter"), tensors(tmp_path / "killed" / "adapter")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
