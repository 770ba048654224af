"""Writes down, from inside an unmodified script, the engine under which its Trainer trained and what each process has.

report-<rank>.json: the engine's class, elements of the base and of the factors that this process holds and has in all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def report_after_steps(directory: str) -> None:
    """From now on, after every optimizer step of a training with a `SORSACallback`.

    Not when training ends: an evaluation leaves the outermost of FSDP2's modules whole.
    """
    from sorsa_transformers import SORSACallback

    original = SORSACallback.on_step_end

    def on_step_end(self: SORSACallback, *args: Any, model: Any, **kwargs: Any) -> None:
        original(self, *args, model=model, **kwargs)
        from sorsa_plugin.regularizer.trained_factors import model_factors

        assert self.attachment is not None
        engine, factors = self.attachment.engine, model_factors(model)
        frozen = [parameter for name, parameter in model.named_parameters() if "sorsa_factors" not in name]
        found = {
            "engine": type(engine).__name__,
            "steps": self.attachment.steps,
            "processes": torch.distributed.get_world_size(),
            "base": sum(map(_elements, frozen)),
            "base_here": sum(map(_elements_here, frozen)),
            "factors": sum(_elements(factor.offset) for factor in factors),
            "factors_here": sum(share.offset.numel() for share in engine.shares(factors)),
        }
        (Path(directory) / f"report-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))

    SORSACallback.on_step_end = on_step_end


def _elements(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _elements_here(parameter: Any) -> int:
    if hasattr(parameter, "ds_tensor"):  # its partition; of small parameters DeepSpeed keeps a whole copy besides
        return parameter.ds_tensor.numel()
    return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()
