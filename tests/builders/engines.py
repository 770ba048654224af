"""How every engine is set up on the CPU, for the scripts that a launcher starts: models, arguments, shims."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

ENGINES = ("single", "ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3")

FORCED_PARTITIONS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "sub_group_size": 500,
}
"""Without these ZeRO 3 keeps every parameter of a small model whole, and steps all of them at once."""


def prepare(engine: str) -> None:
    """What has to happen before TrainingArguments."""
    if engine.startswith("fsdp"):
        pretend_cpu_is_an_accelerator()
    if engine.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = "cpu"


def pretend_cpu_is_an_accelerator() -> None:
    """accelerate runs FSDP on accelerators only, and transformers bf16: make them say gloo, CPU and yes."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    import torch.distributed as dist
    import transformers.training_args
    from accelerate import state
    from accelerate.utils import DistributedType

    state.PartialState._prepare_backend = lambda self, cpu=False, sagemaker_dp=False, backend=None: (
        "gloo",
        DistributedType.MULTI_GPU,
    )
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def engine_arguments(engine: str, *, ram_efficient: bool = False, zero: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keywords of TrainingArguments."""
    if engine.startswith("fsdp"):
        config = {
            "version": int(engine[-1]),
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "cpu_ram_efficient_loading": ram_efficient,
        }
        if engine == "fsdp1":
            config["sync_module_states"] = False
        return {"fsdp": True, "fsdp_config": config}
    if engine.startswith("zero"):
        stage = {"stage": int(engine[-1]), "stage3_gather_16bit_weights_on_model_save": True, **FORCED_PARTITIONS}
        return {
            "use_cpu": True,
            "deepspeed": {
                "zero_optimization": stage | (zero or {}),
                "bf16": {"enabled": "auto"},
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
        }
    return {"use_cpu": True}


def build_model(layers: int = 2) -> torch.nn.Module:
    """A Llama whose partitions fall in the middle of rows: some of its factors have 49 rows."""
    from builders.llama import tiny_llama

    return tiny_llama(layers=layers, intermediate=49).train()


def load_quantised(directory: Path, storage: str = "float32") -> torch.nn.Module:
    """A saved model with 4-bit linears, stored as a floating dtype: what FSDP can shard."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.float32)


def perturb(model: torch.nn.Module, to_bf16: bool = False) -> None:
    """Move the factors off orthonormality: there the regularizer's gradient is smooth and large enough to matter.

    to_bf16: by offsets that bf16 has, because DeepSpeed's bf16 rounds them before it makes their masters.
    """
    from sorsa_plugin import SORSALayer

    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, SORSALayer):
            with torch.no_grad():
                factors = layer.get_factors()
            layer.set_factors("default", *(P + 0.05 * torch.randn(P.shape, generator=generator) for P in factors))
            for offset in (layer.factors("default").get_parameter(name) for name in ("dU", "dS", "dV")):
                offset.data = offset.data.bfloat16().float() if to_bf16 else offset.data


def leave() -> None:
    """End the process group, after the trainer is gone: DDP's destructor waits for its group."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
