"""What every process of a distributed test runs: a few Trainer steps on a tiny Llama, started by torchrun.

torchrun --nproc_per_node 2 train_worker.py OUTPUT_DIR {single|ddp|fsdp2} [--self-attach] [--ram-efficient] ...
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch


def pretend_cpu_is_an_fsdp_device() -> None:
    """accelerate runs FSDP on accelerators only: make its state say gloo and CPU, before TrainingArguments."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    import torch.distributed as dist
    from accelerate import state
    from accelerate.utils import DistributedType

    state.PartialState._prepare_backend = lambda self, cpu=False, sagemaker_dp=False, backend=None: (
        "gloo",
        DistributedType.MULTI_GPU,
    )
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def build_model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def load_quantised(directory: Path) -> torch.nn.Module:
    """A saved model with 4-bit linears, stored as fp32: what FSDP can shard."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.float32)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.float32)


def build_data(count: int = 32) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, 64, (count, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def perturb(model: torch.nn.Module) -> None:
    """Move the factors off orthonormality: there the regularizer's gradient is smooth and large enough to matter."""
    from sorsa_plugin import SORSALayer

    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, SORSALayer):
            with torch.no_grad():
                factors = layer.get_factors()
            layer.set_factors("default", *(P + 0.05 * torch.randn(P.shape, generator=generator) for P in factors))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("engine", choices=["single", "ddp", "fsdp2"])
    parser.add_argument("--self-attach", action="store_true")
    parser.add_argument("--ram-efficient", action="store_true")
    parser.add_argument("--update", default="coupled")
    parser.add_argument("--gamma", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--quantise", type=Path, help="directory of a model to load in 4 bits")
    parser.add_argument("--residual", action="store_true")
    options = parser.parse_args()

    if options.engine == "fsdp2":
        pretend_cpu_is_an_fsdp_device()
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from sorsa_plugin import SORSAConfig
    from sorsa_transformers import SORSACallback, last_complete_checkpoint

    world = int(os.environ.get("WORLD_SIZE", "1"))
    engine: dict[str, object] = {"use_cpu": True}
    if options.engine == "fsdp2":
        engine = {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "cpu_ram_efficient_loading": options.ram_efficient,
            },
        }
    arguments = TrainingArguments(
        str(options.output / "run"),
        max_steps=options.steps,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=options.steps if not options.resume else 2,
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **engine,
    )
    config = SORSAConfig(
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        gamma=options.gamma,
        reg_update=options.update,
        residual_base=options.residual,
    )
    model = build_model() if options.quantise is None else load_quantised(options.quantise)
    model = get_peft_model(model, config)
    perturb(model)
    callbacks = [] if options.self_attach else [SORSACallback()]
    trainer = Trainer(model, arguments, train_dataset=build_data(), callbacks=callbacks)
    broadcasts = count_broadcasts()
    checkpoint = last_complete_checkpoint(arguments.output_dir) if options.resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(options.output / "adapter"))
    if trainer.is_world_process_zero():
        report = {
            "distributed_type": str(trainer.accelerator.distributed_type),
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "resumed_from": checkpoint,
            "factor_broadcasts": broadcasts[0],
        }
        (options.output / "report.json").write_text(json.dumps(report))


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


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():  # after the trainer is gone: DDP's destructor waits for its group
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
