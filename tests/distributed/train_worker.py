"""What every process of a trajectory test runs: short Trainer runs of a tiny Llama, one after the other.

torchrun --nproc_per_node 2 train_worker.py OUTPUT_DIR ENGINE SCENARIO...
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
from builders.engine_scenarios import GAMMA, SCENARIOS, STEPS
from builders.engines import ENGINES, build_model, engine_arguments, leave, load_quantised, perturb, prepare
from builders.llama import token_batches


def train(engine: str, scenario: str, output: Path, quantised: Path | None, storage: str) -> dict:
    from accelerate.state import AcceleratorState
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from sorsa_plugin import SORSAConfig
    from sorsa_plugin.regularizer.optimizers import innermost
    from sorsa_plugin.regularizer.step_hooks import attachment_of
    from sorsa_plugin.regularizer.trained_factors import model_factors
    from sorsa_transformers import SORSACallback

    AcceleratorState._reset_state()
    options = dict(SCENARIOS[scenario])
    attached, groups = options.pop("attached", True), options.pop("groups", False)
    early = options.pop("early", False)
    how = {name: options.pop(name) for name in ("ram_efficient", "zero") if name in options}
    gamma, update = options.pop("gamma", GAMMA), options.pop("reg_update", "coupled")
    residual, dtype = options.pop("residual_base", False), options.pop("base", torch.float32)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8 // world,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "optim": "sgd",
        "max_grad_norm": 0.02,  # about half of these gradients
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    arguments = TrainingArguments(str(output / "run"), **defaults | options | engine_arguments(engine, **how))
    config = SORSAConfig(
        r=4,
        rank_pattern={"q_proj": 3},  # partitions of all parameters together then end in the middle of a row, too
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        gamma=gamma,
        reg_update=update,
        residual_base=residual,
    )
    base = build_model().to(dtype) if quantised is None else load_quantised(quantised, storage)
    model = get_peft_model(base, config)
    perturb(model, to_bf16="bf16" in scenario)
    if not attached:  # as many public scripts do; with SORSACallback the frozen factors are placed once more
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("sorsa_" in name)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=token_batches(32),
        callbacks=[SORSACallback()] if attached and not early else [],
    )
    if groups:  # an optimizer passed as an argument is not what the Trainer gives to DeepSpeed
        trainer.create_optimizer = lambda *_: two_groups(trainer)
    if early:
        trainer.create_optimizer = lambda *_: attached_before_it_is_prepared(trainer)
    broadcasts = count_broadcasts()
    trainer.train()
    trainer.save_model(str(output / "adapter"))
    attachment = attachment_of(innermost(trainer.optimizer))
    shares = attachment.engine.shares(model_factors(model))
    return {
        "distributed_type": str(trainer.accelerator.distributed_type),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "grad_norms": [float(e["grad_norm"]) for e in trainer.state.log_history if e.get("grad_norm") is not None],
        "factor_broadcasts": broadcasts[0],
        "steps": attachment.steps,
        "engine": type(attachment.engine).__name__,
        "factors": len(shares),
        "elements_here": sum(share.offset.numel() for share in shares),
        "cut_rows": sum(len(share.cuts) for share in shares),
        "gap_mean": float(attachment.gaps().mean()),
    }


def two_groups(trainer: Any) -> torch.optim.Optimizer:
    """V at half the rate of U and S: engines step group by group, and each has its own eta_max."""
    named = [(name, parameter) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    slow = [parameter for name, parameter in named if name.endswith("dV")]
    fast = [parameter for name, parameter in named if not name.endswith("dV")]
    trainer.optimizer = torch.optim.SGD([{"params": fast, "lr": 1e-2}, {"params": slow, "lr": 5e-3}])
    return trainer.optimizer


def attached_before_it_is_prepared(trainer: Any) -> torch.optim.Optimizer:
    from sorsa_plugin import attach

    trainer.optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-2)
    attach(trainer.model, trainer.optimizer)
    return trainer.optimizer


def count_broadcasts() -> list[int]:
    """Counts the frozen factors that DDP broadcasts in its forwards, from now on."""
    from torch.nn.parallel import DistributedDataParallel

    counter = [0]
    original = DistributedDataParallel._sync_buffers

    def counted(self: DistributedDataParallel) -> None:
        counter[0] += sum("sorsa_factors" in name for name, _ in self.module.named_buffers())
        original(self)

    DistributedDataParallel._sync_buffers = counted
    return counter


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("scenarios", nargs="+", choices=list(SCENARIOS))
    parser.add_argument("--quantised", type=Path, help="directory of a model to load in 4 bits")
    parser.add_argument("--storage", default="float32", help="dtype that holds the 4 bits")
    options = parser.parse_args()
    prepare(options.engine)
    reports = {}
    for scenario in options.scenarios:
        reports[scenario] = train(
            options.engine, scenario, options.output / scenario, options.quantised, options.storage
        )
        gc.collect()
        if int(os.environ.get("RANK", "0")) == 0:
            (options.output / "report.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    leave()
