"""Recipes on real GSM8K rows and the embedded base, run by the real `axolotl` commands in processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]
HERE = TESTS / "with_axolotl"
ROOT = TESTS.parent
BASE = ROOT / "integrations" / "sorsa_quickstart" / "base"
GSM8K = ROOT / "examples" / "data" / "gsm8k" / "train.jsonl"
PREFERENCES = ROOT / "examples" / "data" / "gsm8k_preferences.jsonl"

TIMEOUT = 900
"""Seconds after which a command hangs."""

METRICS = ("sorsa/gap_mean", "sorsa/gap_max", "sorsa/reg_loss", "sorsa/gamma")

LORA_RECIPE = f"""\
base_model: {BASE}
plugins: [probe_plugin.ProbePlugin]
adapter: lora
lora_r: 8
lora_alpha: 16
lora_dropout: 0.0
lora_target_linear: true
lora_mlp_kernel: false # Triton: not on a CPU
lora_qkv_kernel: false
lora_o_kernel: false
lora_embedding_kernel: false
datasets:
  - path: {GSM8K}
    ds_type: json
    type: {{field_instruction: prompt, field_output: completion, format: "{{instruction}}",
           no_input_format: "{{instruction}}"}}
sequence_len: 256
val_set_size: 16
micro_batch_size: 4
gradient_accumulation_steps: 2
max_steps: 8
save_steps: 4
eval_steps: 4
logging_steps: 1
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 1.0e-3
warmup_steps: 2
bf16: false
fp16: false
tf32: false
use_tensorboard: true
seed: 7
"""
"""A recipe for LoRA as an Axolotl user has it."""

SORSA_RECIPE = LORA_RECIPE.replace("adapter: lora", "adapter: sorsa").replace(
    "plugins: [", "plugins: [sorsa_axolotl.SORSAPlugin, "
)
"""The same with one word changed, and the plug-in."""


@dataclass(frozen=True)
class Run:
    """One finished command."""

    recipe: Path
    output: Path
    log: str
    """What it printed."""
    returncode: int

    @property
    def history(self) -> list[dict[str, float]]:
        """The trainer's log, by step."""
        last = max(self.output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        return json.loads((last / "trainer_state.json").read_text())["log_history"]

    def logged(self, key: str) -> dict[int, float]:
        return {int(entry["step"]): entry[key] for entry in self.history if key in entry}

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "adapter_model.safetensors")

    @property
    def logits(self) -> torch.Tensor:
        """What the trained model answered in the training process."""
        return load_file(self.output / "probe.safetensors")["logits"]

    @property
    def probe(self) -> dict[str, Any]:
        return json.loads((self.output / "probe.json").read_text())


def recipe(**changes: Any) -> dict[str, Any]:
    """The SORSA recipe with changes; None deletes a key."""
    return {key: value for key, value in (yaml.safe_load(SORSA_RECIPE) | changes).items() if value is not None}


def axolotl(
    command: str,
    text: str | dict[str, Any],
    output: Path,
    *options: str,
    stdin: str = "",
    path: Sequence[Path] = (),
    processes: int = 1,
) -> Run:
    """Run `axolotl <command>` on a recipe; checks that the base model's files stay as they were.

    Args:
        text: the recipe, YAML or parsed.
        output: its output_dir; the recipe is written beside it.
        path: goes first on the process's PYTHONPATH.
        processes: of torchrun, on CPUs, where it is more than one.
    """
    written = output.parent / f"{output.name}.{command}.yaml"
    written.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    places = [f"--output-dir={output}", f"--dataset-prepared-path={output.parent / 'prepared'}"]
    launcher = ["--launcher", "python"] if command in ("train", "inference") else []
    if processes > 1:
        path = [TESTS / "distributed" / "on_cpus", TESTS / "distributed", TESTS]
        launcher = ["--launcher", "torchrun", "--", "--standalone", f"--nproc_per_node={processes}"]
    before = hashes(BASE)
    started = subprocess.Popen(
        [sys.executable, "-m", "axolotl.cli.main", command, str(written), *places, *options, *launcher],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=output.parent,
        env=environment(*path),
        start_new_session=True,
    )
    try:
        printed, complained = started.communicate(stdin, timeout=TIMEOUT)
    finally:
        if started.poll() is None:  # it hangs: with all that it started
            os.killpg(started.pid, signal.SIGKILL)
    assert hashes(BASE) == before
    return Run(written, output, printed + complained, started.returncode)


def trained(text: str | dict[str, Any], output: Path, *options: str, processes: int = 1) -> Run:
    run = axolotl("train", text, output, *options, processes=processes)
    assert run.returncode == 0, run.log[-4000:]
    return run


def assert_the_same_end(run: Run, whole: Run, start: int) -> None:
    """That a run resumed at step `start` is, from there, bit for bit one that was not interrupted."""
    for name, tensor in whole.adapter.items():
        assert torch.equal(run.adapter[name], tensor), name
    for key in ("loss", "grad_norm", *METRICS):
        expected = {step: value for step, value in whole.logged(key).items() if step > start}
        assert {step: value for step, value in run.logged(key).items() if step > start} == expected


def assert_the_change_was_added(merged: Any, run: Run) -> None:
    """That a model in fp32 has the base's weights, plus U S V^T - U0 S0 V0^T where the run adapted them."""
    factors = {name: tensor.double() for name, tensor in run.adapter.items()}
    weights = merged.state_dict()
    for name, weight in base_model().state_dict().items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.sorsa_factors"
        if f"{prefix}.dU" not in factors:
            assert torch.equal(weights[name], weight)
            continue
        U0, S0, V0, dU, dS, dV = (factors[f"{prefix}.{part}"] for part in ("U0", "S0", "V0", "dU", "dS", "dV"))
        change = (U0 + dU) * (S0 + dS) @ (V0 + dV).T - U0 * S0 @ V0.T
        assert change.abs().max() > 1e-3
        # fp32: each entry of the change is a sum of 2 x 8 products of rounded terms (a few eps of their size, at most
        # max(S) as U and V have unit columns), and one rounding of the sum
        tolerance = torch.finfo(torch.float32).eps * (16 * S0.max() + weight.abs().max())
        torch.testing.assert_close(weights[name].double(), weight.double() + change, rtol=0, atol=float(tolerance))


def environment(*path: Path) -> dict[str, str]:
    places = os.pathsep.join(map(str, [*path, HERE]))
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # Axolotl starts `torchrun`
    own = {"PATH": commands, "PYTHONPATH": places, "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | own


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def base_model(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype)


def base_logits() -> torch.Tensor:
    """What the base model answers without an adapter."""
    from with_axolotl.probe_plugin import INPUT_IDS

    with torch.no_grad():
        return base_model().eval()(input_ids=INPUT_IDS).logits


def plain_peft_logits(adapter: Path) -> torch.Tensor:
    """What a saved adapter answers in plain PEFT on the base model as it is on disk."""
    from peft import PeftModel
    from with_axolotl.probe_plugin import INPUT_IDS

    model = PeftModel.from_pretrained(base_model(), str(adapter)).eval()
    with torch.no_grad():
        return model(input_ids=INPUT_IDS).logits
