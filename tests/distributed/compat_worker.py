"""What every process of the DeepSpeed compat test runs: an engine of one stage, and what our code reads of it.

torchrun --nproc_per_node N compat_worker.py OUTPUT_DIR STAGE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
from builders.engines import FORCED_PARTITIONS
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sorsa_distributed import deepspeed_compat as compat
from sorsa_plugin import SORSAConfig


def main(output: Path, stage: int) -> None:
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=9,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = get_peft_model(LlamaForCausalLM(config), SORSAConfig(r=2, target_modules=["q_proj", "up_proj"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, **(FORCED_PARTITIONS if stage == 3 else {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=1e-3), config=settings)
    zero = engine.optimizer
    names, on_parameter = (compat.STAGE_3, compat.PARAMETER_3) if stage == 3 else (compat.STAGE_12, compat.PARAMETER_12)
    report = {
        "class": type(zero).__name__,
        "missing": [name for name in names if not hasattr(zero, name)],
        "missing on parameters": [name for name in on_parameter for p in trained if not hasattr(p, name)],
        "linked": all(map(compat.is_linked, trained)),
        "driving": compat.zero_driving(zero.optimizer) is zero,
        "of parameters": [found is zero for found in compat.stage3_of(trained)],
        "loaded": compat.is_loaded(),
        "whole": [list(p.shape) for p in trained],
        "gathered": [],
    }
    with compat.gathered(trained):
        report["gathered"] = [list(p.shape) for p in trained]
    if torch.distributed.get_rank() == 0:
        (output / "report.json").write_text(json.dumps(report))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
