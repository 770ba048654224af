"""What every process of an initialisation test runs: a base loaded as the engine loads it, a new adapter, a few steps.

torchrun --nproc_per_node N init_worker.py OUTPUT_DIR ENGINE BASE_DIR [--adapter DIR] [--steps N]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

import torch
from builders.engines import ENGINES, engine_arguments, leave, prepare
from builders.llama import token_batches


def digest(model: torch.nn.Module) -> str:
    """Of the frozen factors and fingerprints as this process has them."""
    from sorsa_plugin.files.adapter_format import FROZEN
    from sorsa_plugin.layers.layer import sorsa_layers

    total = hashlib.sha256()
    for layer in sorsa_layers(model):
        for name in FROZEN:
            tensor = getattr(layer.factors("default"), name)
            if not tensor.is_meta:
                total.update(tensor.detach().numpy().tobytes())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("base")
    parser.add_argument("--adapter")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--meta", action="store_true", help="only the first rank loads weights")
    options = parser.parse_args()
    prepare(options.engine)
    if options.engine == "fsdp2":  # what `accelerate launch` says
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_VERSION": "2"}

    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    import sorsa_plugin.tuner.initialise
    from sorsa_plugin import SORSAConfig
    from sorsa_plugin.layers.layer import sorsa_layers
    from sorsa_transformers import SORSACallback

    factorised = []
    original = sorsa_plugin.tuner.initialise.factorise

    def counted(matrix, *args, **kwargs):
        factorised.append(kwargs["name"])
        return original(matrix, *args, **kwargs)

    sorsa_plugin.tuner.initialise.factorise = counted
    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        str(options.output / "run"),
        max_steps=options.steps,
        per_device_train_batch_size=8 // world,
        learning_rate=1e-2,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **engine_arguments(options.engine, **({"ram_efficient": True} if options.engine == "fsdp2" else {})),
    )
    base = AutoModelForCausalLM.from_pretrained(options.base)
    if options.meta and int(os.environ["RANK"]) > 0:
        for module in base.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad))
    weight = base.model.layers[0].mlp.down_proj.weight
    here = "meta" if weight.is_meta else "apart" if weight.numel() == 0 else "whole"
    if options.adapter:
        model = PeftModel.from_pretrained(base, options.adapter, is_trainable=True)
    else:
        model = get_peft_model(
            base,
            SORSAConfig(
                r=4, rank_pattern={"q_proj": 3}, target_modules="all-linear", task_type="CAUSAL_LM", gamma=4e-4
            ),
        )
    if world == 1:
        model.save_pretrained(str(options.output / "untrained"))
    after = "meta" if weight.is_meta else "apart" if weight.numel() == 0 else "whole"
    mine = {"digest": digest(model), "factorised": len(factorised), "base": here, "base_after": after}
    everyone = [mine]
    if world > 1:
        everyone = [None] * world
        torch.distributed.all_gather_object(everyone, mine)
    trainer = Trainer(model, arguments, train_dataset=token_batches(32), callbacks=[SORSACallback()])
    trainer.train()
    checked = [layer.factors("default").base_checked for layer in sorsa_layers(trainer.model)]
    trainer.save_model(str(options.output / "adapter"))
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        report = {"processes": everyone, "losses": losses, "base_checked": all(checked)}
        (options.output / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    leave()
