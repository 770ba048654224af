"""Merging into the base weight, and back bit for bit: the original is kept, another tensor takes its place."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from .errors import MergeError
from .folding import refold

if TYPE_CHECKING:
    from .layer import SORSALayer


class Mergeable(nn.Module):
    """What a layer needs to be merged; a part of `SORSALayer`."""

    _original: list[torch.Tensor]
    """The weight while an adapter is merged; in a list, so that it is not registered."""

    @torch.no_grad()
    def merge(self: SORSALayer, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # type: ignore[misc]
        """Add the changes of the given (default: active) adapters to the base weight, in fp32 at least, rounded once.

        Args:
            safe_merge: look for NaN and infinity before the weight is replaced.
            adapter_names: the adapters to merge; those already merged are left out with a warning.

        Raises:
            ValueError: safe_merge found NaN or infinity; the weight is untouched.
            MergeError: the weight is not here as a whole.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.sorsa_factors]
        if not names:
            return
        original = self._original[0] if self._original else self.base_weight()
        if original.numel() == 0 and self.out_features and self.in_features:
            raise MergeError(
                f"The weight of {self.name} is partitioned over processes (DeepSpeed ZeRO 3), and merging takes the "
                "whole one. Merge, read and unmerge within deepspeed.zero.GatheredParameters(model.parameters()), as "
                "TRL does; or save the adapter and use `sorsa merge`."
            )
        base = original if self.folded is None else self.folded.intact.to(original.device)
        total = base.to(torch.promote_types(base.dtype, torch.float32))
        for name in [*self.merged_adapters, *names]:
            total = total + self.get_delta_weight(name).to(total.device)
            if safe_merge and not torch.isfinite(total).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"  # PEFT's wording
                )
        self._original = [original]
        self._set_base_weight(nn.Parameter(total.to(original.dtype), requires_grad=original.requires_grad))
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self: SORSALayer) -> None:  # type: ignore[misc]
        """Put the kept original weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self._original.pop()
        weight.data = weight.data.to(self.base_weight().device)
        self._set_base_weight(weight)
        self.merged_adapters.clear()
        if self.folded is not None:  # its initial triplets may have been loaded anew while it was merged
            refold(self)

    def _set_base_weight(self: SORSALayer, weight: torch.Tensor) -> None:  # type: ignore[misc]
        """Another tensor as the base weight; a module that shares the first one (tied embeddings) keeps that."""
        setattr(self.get_base_layer(), self.parameter_name, weight)

    def unmerge_if_disabled(self: SORSALayer) -> None:  # type: ignore[misc]
        """PEFT's contract: disabling adapters while they are merged unmerges them at the next forward."""
        if self.disable_adapters and self.merged:
            self.unmerge()

    def refuse_lost_merge(self: SORSALayer) -> None:  # type: ignore[misc]
        """For a forward with a merged weight.

        Raises:
            MergeError: FSDP2 gathered its own weight, which lacks the change.
        """
        if hasattr(self._original[0], "device_mesh") and not hasattr(self.base_weight(), "device_mesh"):
            raise MergeError(
                f"{self.name} is merged, and FSDP2 runs its forward with the weight that it sharded, without the "
                "change. Merge to read the weights, as TRL does, and call unmerge_adapter() before the next forward."
            )
