"""last_complete_checkpoint: what counts as complete, and that training resumes from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from builders.trainer_runs import adapted, make_trainer
from safetensors.torch import save_file
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemWriter
from transformers import TrainingArguments

from sorsa_transformers import SORSACallback, last_complete_checkpoint

WEIGHTS = "adapter_model.safetensors"
STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def checkpoint(directory: Path, step: int) -> Path:
    """The files of a complete checkpoint, as small as they can be."""
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"dU": torch.ones(4, 3)}, path / WEIGHTS)
    for name in STATES:
        torch.save({"state": torch.ones(100)}, path / name)
    (path / "trainer_state.json").write_text('{"global_step": 1}')
    return path


def cut(path: Path, length: int) -> None:
    """Keep the first bytes only; a negative length counts from the end."""
    path.write_bytes(path.read_bytes()[:length])


DAMAGE = {
    "no trainer state": lambda path: (path / "trainer_state.json").unlink(),
    "empty trainer state": lambda path: cut(path / "trainer_state.json", 0),
    "half a trainer state": lambda path: cut(path / "trainer_state.json", 9),
    "no weights": lambda path: (path / WEIGHTS).unlink(),
    "empty weights": lambda path: cut(path / WEIGHTS, 0),
    "half a header": lambda path: cut(path / WEIGHTS, 20),
    "half the weights": lambda path: cut(path / WEIGHTS, -24),
    "all but one byte": lambda path: cut(path / WEIGHTS, -1),
    "a list as trainer state": lambda path: (path / "trainer_state.json").write_text("[]"),
    "a trainer state without a step": lambda path: (path / "trainer_state.json").write_text("{}"),
    "an endless trainer state": lambda path: (path / "trainer_state.json").write_text("[" * 100_000 + "]" * 100_000),
    **{f"no {name}": lambda path, name=name: (path / name).unlink() for name in STATES},
    **{f"empty {name}": lambda path, name=name: cut(path / name, 0) for name in STATES},
    **{f"half of {name}": lambda path, name=name: cut(path / name, 600) for name in STATES},
    **{f"all but one byte of {name}": lambda path, name=name: cut(path / name, -1) for name in STATES},
    **{f"zeros for {name}": lambda path, name=name: (path / name).write_bytes(bytes(2000)) for name in STATES},
    "an absent shard": lambda path: (path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors"}}'
    ),
    "an empty scaler": lambda path: (path / "scaler.pt").touch(),
    "DeepSpeed's folder is gone": lambda path: (path / "latest").write_text("global_step10"),
    "an empty directory": lambda path: (shutil.rmtree(path), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_passed_over(damage: str, tmp_path: Path) -> None:
    earlier, later = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    assert last_complete_checkpoint(tmp_path) == str(later)
    DAMAGE[damage](later)
    assert last_complete_checkpoint(tmp_path) == str(earlier)
    DAMAGE[damage](earlier)
    assert last_complete_checkpoint(tmp_path) is None


@pytest.mark.parametrize("says", ["nothing", "model only", "states too", "damaged"])
def test_a_checkpoint_of_a_model_alone_is_complete_unless_its_arguments_say_otherwise(
    says: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, 5)
    for name in STATES:
        (path / name).unlink()
    if says != "nothing":
        arguments = TrainingArguments(str(tmp_path), save_only_model=says == "model only", report_to="none")
        torch.save(arguments, path / "training_args.bin")
    if says == "damaged":  # nobody reads it in order to resume
        cut(path / "training_args.bin", 600)
    assert last_complete_checkpoint(tmp_path) == (None if says == "states too" else str(path))


def test_no_file_is_unpickled(tmp_path: Path) -> None:
    """A pickle that would create a file is as good as any."""
    path = checkpoint(tmp_path, 5)
    torch.save(Touches(tmp_path / "touched"), path / "rng_state.pth")
    assert last_complete_checkpoint(tmp_path) == str(path)
    assert not (tmp_path / "touched").exists()


class Touches:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_newest_is_by_number_and_other_names_are_ignored(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-101.tmp", "old-checkpoint-200", "checkpoint-"):
        shutil.copytree(tmp_path / "checkpoint-9", tmp_path / name)
    (tmp_path / "checkpoint-300").write_text("a file")
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-100")


def test_nothing_to_resume_from_is_none(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "file").write_text("")
    assert last_complete_checkpoint(tmp_path / "file") is None


@pytest.mark.parametrize("damage", ["no trainer state", "half the weights"])
def test_training_resumes_from_the_checkpoint_before_the_one_killed_while_saving(damage: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-4}

    def run(resume: str | None = None) -> list[dict[str, float]]:
        trainer = make_trainer(adapted(gamma=1e-3), tmp_path, callbacks=[SORSACallback()], max_steps=6, **options)
        trainer.train(resume_from_checkpoint=resume)
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    whole = run()
    DAMAGE[damage](tmp_path / "run" / "checkpoint-6")
    found = last_complete_checkpoint(tmp_path / "run")
    assert found == str(tmp_path / "run" / "checkpoint-4")
    assert run(found) == whole


SHARDED = {
    "": lambda path: None,
    "no metadata": lambda path: (path / "optimizer_0" / ".metadata").unlink(),
    "half the metadata": lambda path: cut(path / "optimizer_0" / ".metadata", 200),
    "no shard of the model": lambda path: (path / "pytorch_model_fsdp_0" / "__0_1.distcp").unlink(),
    "no shard of the optimizer": lambda path: (path / "optimizer_0" / "__0_0.distcp").unlink(),
    "half a shard": lambda path: cut(path / "pytorch_model_fsdp_0" / "__0_0.distcp", -40),
}


@pytest.mark.parametrize("damage", SHARDED)
def test_fsdp2s_checkpoints_are_complete_with_all_their_parts(damage: str, tmp_path: Path) -> None:
    """In two shards each, instead of the adapter's file."""
    earlier, later = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    (later / WEIGHTS).unlink()
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        state = {"model": {name: torch.ones(30) for name in ("dU", "dV")}}
        writer = FileSystemWriter(later / part, thread_count=2)
        distributed_checkpoint.save(state, storage_writer=writer, no_dist=True)
    assert len(list(later.rglob("*.distcp"))) == 4
    SHARDED[damage](later)
    assert last_complete_checkpoint(tmp_path) == str(earlier if damage else later)


def test_deepspeeds_checkpoints_are_complete_with_all_their_parts(tmp_path: Path) -> None:
    earlier, later = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    partition = later / "global_step10" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    partition.parent.mkdir()
    torch.save({"exp_avg": torch.ones(100)}, partition)
    assert last_complete_checkpoint(tmp_path) == str(later)
    cut(partition, 200)
    assert last_complete_checkpoint(tmp_path) == str(earlier)
