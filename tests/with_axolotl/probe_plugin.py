"""An Axolotl plug-in for tests, loaded by the real commands: runs on the CPU, and writes down what was trained.

In `output_dir`: probe.safetensors, the trained model's logits on `INPUT_IDS`; probe.json, the dtypes met in training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from safetensors.torch import save_file

INPUT_IDS = torch.arange(3, 35)[None]


class ProbePlugin(BasePlugin):
    activations: set[str]

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        if cfg.world_size > 1:  # the first call after Axolotl asked for the GPU of each process's number
            cfg.device_map = None

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"use_cpu": True}  # Axolotl drops its recipe's key, and the Trainer refuses bf16 without it

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        self.activations = set()
        layer = next(module for name, module in trainer.model.named_modules() if name.endswith("q_proj"))
        layer.register_forward_hook(lambda module, args, output: self.activations.add(str(output.dtype)))
        return []

    def post_train(self, cfg: Any, model: Any) -> None:
        if cfg.world_size > 1:
            return
        directory = Path(cfg.output_dir)
        if (directory / "probe.json").exists():  # Axolotl calls this twice; the first model is the trainer's
            return
        dtypes = {
            kind: sorted({str(p.dtype) for name, p in named if (kind == "trained") == p.requires_grad and name})
            for kind, named in (("trained", list(model.named_parameters())), ("frozen", list(model.named_parameters())))
        }
        adapter = {str(tensor.dtype) for name, tensor in model.state_dict().items() if "sorsa_factors" in name}
        record = {
            **dtypes,
            "adapter": sorted(adapter),
            "activations": sorted(self.activations),
            "gradient_checkpointing": any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
        }
        (directory / "probe.json").write_text(json.dumps(record))
        training = model.training
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=INPUT_IDS).logits.float()
        model.train(training)
        save_file({"logits": logits.contiguous()}, directory / "probe.safetensors")
