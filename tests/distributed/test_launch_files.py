"""Every file in examples/distributed trains the example script here, under its own engine: what a CPU cannot do is
overridden on the command line (processes, machines, bf16), everything else is the file's."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from builders.processes import ANNOUNCED, HERE, TESTS
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

from sorsa_quickstart.answering import BASE
from sorsa_quickstart.task import train_examples

pytestmark = pytest.mark.distributed

ROOT = TESTS.parent
FILES = ROOT / "examples" / "distributed"
SMALL = {
    "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip

TRAINING = shlex.split("--rank 4 --max-steps 3 --max-length 256 --lr 1e-3 --eval-examples 4")


class Launch(NamedTuple):
    """What a file says it does.

    Attributes:
        engine: class of the engine.
        shards_base, shards_factors: whether each process has a part.
        model: what is trained with it.
    """

    engine: str
    shards_base: bool
    shards_factors: bool
    model: str = "llama"


LAUNCHES = {
    "ddp-1x8.yaml": Launch("WholeFactors", False, False),
    "zero2-8x8.yaml": Launch("ZeRO12", False, True),
    "fsdp2-1x8.yaml": Launch("FSDP2", True, True),
    "fsdp2-8x8.yaml": Launch("FSDP2", True, True, "mixtral"),
    "zero3-1x8.yaml": Launch("ZeRO3", True, True),
    "zero3-8x8.yaml": Launch("ZeRO3", True, True),
    "zero3.json": Launch("ZeRO3", True, True),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data."""
    directory = tmp_path_factory.mktemp("material")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    size = SMALL | {"vocab_size": len(tokenizer)}
    for config in (LlamaConfig(**size), MixtralConfig(**size, num_local_experts=4, num_experts_per_tok=2)):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory / config.model_type)
        tokenizer.save_pretrained(directory / config.model_type)
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in train_examples(48)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def command_of(file: Path) -> str:
    """The command that the file's first lines, or, for a file of DeepSpeed's, the page's, give."""
    page = file.read_text() if file.suffix == ".yaml" else (FILES / "README.md").read_text()
    found = re.search(rf"^#? ?((?:accelerate|deepspeed) .*{re.escape(file.name)}.*)$", page, re.MULTILINE)
    assert found, file
    return found[1]


def free_port() -> str:
    """One below those that systems give to outgoing connections: on one of these, a process that waits for the first
    machine may reach itself, and take the port from it."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return str(port)
    raise OSError("None of 100 ports is free.")


def commands(file: Path, model: Path, data: Path, output: Path) -> list[list[str]]:
    """Its command on two processes: on one machine, or on each of two."""
    port = free_port()
    program, *words = shlex.split(command_of(file).replace(" --bf16", ""))
    words = [{"MODEL": str(model), "DATA": str(data)}.get(word, word) for word in words]
    words += ["--output", str(output), "--batch", "4", *TRAINING]
    if "mixtral" in model.name:
        words += ["--target-modules", "q_proj,k_proj,v_proj,o_proj"]
    if program == "deepspeed":
        here = ["--num_gpus", "2", "--master_port", port]
        first = words.index("--num_gpus")
        return [[sys.executable, "-m", "deepspeed.launcher.runner", *here, *words[:first], *words[first + 2 :]]]
    machines = 2 if "8x8" in file.name else 1
    here = ["--mixed_precision", "no"] if "zero" not in file.name else []
    here += ["--num_processes", "2", "--num_machines", str(machines), "--main_process_ip", "127.0.0.1"]
    here += ["--main_process_port", port]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", words[0], *words[1:3], *here]
    if machines == 1:
        return [[*launch, *words[3:]]]
    assert words[3:5] == ["--machine_rank", "N"]
    return [[*launch, "--machine_rank", str(machine), *words[5:]] for machine in range(machines)]


def run_together(started: list[list[str]], report: Path, data_parallel: bool, timeout: float = 240) -> None:
    """Run the commands of all machines at once."""
    environment = {key: value for key, value in os.environ.items() if key not in ANNOUNCED}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "SORSA_TEST_REPORT": str(report)}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [HERE / "on_cpus", HERE, TESTS]))
    if data_parallel:
        environment["ACCELERATE_USE_CPU"] = "true"
    logs = [report / f"machine-{number}.log" for number in range(len(started))]
    machines = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)
        for command, log in zip(started, logs, strict=True)
    ]
    try:
        with suppress(subprocess.TimeoutExpired):  # then stopped below, which is no success
            for machine in machines:
                machine.wait(timeout)
    finally:
        for machine in machines:
            machine.terminate()
            machine.wait()
    codes = [machine.returncode for machine in machines]
    assert codes == [0] * len(machines), "\n".join([str(codes), *(log.read_text()[-6000:] for log in logs)])


def test_every_file_is_launched() -> None:
    files = {path.name for path in FILES.iterdir()} - {"README.md"}
    named = {word for file in FILES.glob("*.yaml") for word in re.findall(r"\w+\.json", file.read_text())}
    assert files == LAUNCHES.keys() | named


@pytest.fixture(scope="module")
def alone(material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The summary of one process without a launcher."""
    output = tmp_path_factory.mktemp("alone")
    options = [*TRAINING, "--batch", "8", "--model", str(material / "llama"), "--data", str(material / "data.jsonl")]
    command = [sys.executable, "examples/hf_trainer.py", *options, "--gradient-checkpointing", "--output", str(output)]
    run_together([command], output, data_parallel=True)
    return json.loads((output / "summary.json").read_text())


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_file_trains_the_example_under_its_engine(
    name: str, material: Path, alone: dict[str, float], tmp_path: Path
) -> None:
    expected = LAUNCHES[name]
    base = material / expected.model
    started = commands(FILES / name, base, material / "data.jsonl", tmp_path / "run")
    run_together(started, tmp_path, data_parallel=expected.engine == "WholeFactors")
    ranks = [json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in range(2)]
    for found in ranks:
        assert (found["engine"], found["processes"], found["steps"]) == (expected.engine, 2, 3)
        assert (found["base_here"] < 0.6 * found["base"]) == expected.shards_base
        assert (found["factors_here"] < 0.6 * found["factors"]) == expected.shards_factors
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    if expected.model == "llama":  # three steps on the same data; sums in another order, some ulp of a loss of 7 (5e-7)
        assert summary["eval_loss_after"] == pytest.approx(alone["eval_loss_after"], abs=1e-5)
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    layers = 2 * (4 if expected.model == "mixtral" else 7)
    assert len(tensors) == 7 * layers  # three offsets, three frozen factors and the fingerprint
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "adapter").eval()
    ids = torch.arange(3, 35)[None]
    with torch.no_grad(), model.disable_adapter():
        untrained = model(ids).logits
    with torch.no_grad():
        assert (model(ids).logits - untrained).abs().max() > 1e-3
