"""What every process of the test of a run's life does: merges for a sampler, saves in mid-run, meets a bad gradient.

torchrun --nproc_per_node 2 life_worker.py OUTPUT_DIR ENGINE
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
from builders.engines import ENGINES, build_model, engine_arguments, leave, perturb, prepare
from builders.llama import token_batches
from transformers import TrainerCallback

STEPS = 6
READ_AT = (2, 4)
SAVED_AT = 3
BAD_AT = 3


class Reads(TrainerCallback):
    """Before some steps, reads the merged weights as TRL's GRPO trainer does to hand them to vLLM."""

    def __init__(self, trainer: Any) -> None:
        from trl.distributed import DistributedBackend
        from trl.generation.vllm_generation import VLLMGeneration

        self.sampler = VLLMGeneration.__new__(VLLMGeneration)  # without vLLM: what reads the weights needs these
        self.sampler.model = trainer.model
        self.sampler.accelerator = trainer.accelerator
        self.sampler._dist = DistributedBackend(trainer.accelerator)
        self.read: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step in READ_AT:
            self.read = {name: weight.detach().clone() for name, weight in self.sampler._iter_named_params()}


class Saves(TrainerCallback):
    """Saves the model in mid-run, outside of the Trainer's checkpoints."""

    def __init__(self, trainer: Any, output: Path) -> None:
        self.trainer, self.output = trainer, output

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == SAVED_AT:
            self.trainer.save_model(str(self.output))


class Spoils(TrainerCallback):
    """Makes one number NaN on the last rank, on its way back through the first decoder layer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.layer = model.get_base_model().model.layers[0]

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == BAD_AT and args.process_index == args.world_size - 1:
            self.layer.register_forward_hook(self.spoil)

    @staticmethod
    def spoil(module, inputs, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]

        def spoilt(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient[0, 0, 0] = float("nan")
            return gradient

        hidden.register_hook(spoilt)


def make_trainer(engine: str, output: Path) -> Any:
    from accelerate.state import AcceleratorState
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from sorsa_plugin import SORSAConfig
    from sorsa_transformers import SORSACallback

    AcceleratorState._reset_state()
    arguments = TrainingArguments(
        str(output / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=1e-2,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **engine_arguments(engine),
    )
    config = SORSAConfig(
        r=4, rank_pattern={"q_proj": 3}, target_modules="all-linear", task_type="CAUSAL_LM", gamma=0.05
    )
    model = get_peft_model(build_model(), config)
    perturb(model)
    return Trainer(model, arguments, train_dataset=token_batches(32), callbacks=[SORSACallback()])


def refusal(action: Any) -> str:
    from sorsa_plugin.errors import MergeError

    try:
        action()
    except MergeError as error:
        return str(error)
    return "nothing"


def misuse(engine: str, trainer: Any) -> str:
    """Merge where the engine cannot have it; what was raised."""
    model, tokens = trainer.model, torch.ones(1, 4, dtype=torch.int64)
    if engine == "zero3":
        return refusal(model.merge_adapter)
    if engine == "fsdp2":
        model.merge_adapter()
        raised = refusal(lambda: model(input_ids=tokens))
        model.unmerge_adapter()
        return raised
    return "nothing"


def live(engine: str, output: Path) -> dict[str, Any]:
    """Train with reading and saving in between; what this process holds of the factors, in elements."""
    trainer = make_trainer(engine, output)
    reads = []

    class Late(TrainerCallback):  # the engine has its model by now
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            reads.append(Reads(trainer))
            trainer.add_callback(reads[0])

    trainer.add_callback(Late())
    trainer.add_callback(Saves(trainer, output / "middle"))
    trainer.train()
    trainer.save_model(str(output / "adapter"))
    if trainer.is_world_process_zero():
        from safetensors.torch import save_file

        save_file({name: weight.contiguous() for name, weight in reads[0].read.items()}, output / "read.safetensors")
    return elements(trainer.model) | {"misuse": misuse(engine, trainer)}


def elements(model: torch.nn.Module) -> dict[str, int]:
    """Of the base, the frozen factors and the offsets, as this process holds them between steps."""
    found = {"base": 0, "frozen": 0, "offsets": 0}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        local = getattr(tensor, "_local_tensor", getattr(tensor, "ds_tensor", tensor))
        part = name.rpartition(".")[2]
        kind = "base" if ".sorsa_factors." not in name else "offsets" if part.startswith("d") else "frozen"
        found[kind] += local.numel()
    return found


def fall(engine: str, output: Path) -> str:
    """Train into a bad gradient; what was raised."""
    from sorsa_plugin.errors import NonFiniteGradientError

    trainer = make_trainer(engine, output)
    trainer.add_callback(Spoils(trainer.model))
    try:
        trainer.train()
    except NonFiniteGradientError as error:
        offsets = [p for name, p in trainer.model.named_parameters() if p.requires_grad]
        local = [getattr(p, "_local_tensor", getattr(p, "ds_tensor", p)) for p in offsets]
        assert all(torch.isfinite(p).all() for p in local)
        return str(error)
    return "nothing"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("engine", choices=ENGINES)
    options = parser.parse_args()
    prepare(options.engine)
    options.output.mkdir(parents=True, exist_ok=True)
    mine: dict[str, Any] = live(options.engine, options.output)
    gc.collect()
    trainer = make_trainer(options.engine, options.output)
    trainer.train()
    trainer.save_model(str(options.output / "undisturbed"))
    del trainer
    gc.collect()
    mine["error"] = fall(options.engine, options.output)
    everyone = [mine]
    if torch.distributed.is_initialized():
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
    if int(os.environ.get("RANK", "0")) == 0:
        (options.output / "report.json").write_text(json.dumps({"processes": everyone}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    leave()
