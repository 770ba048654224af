"""Merging: adds changes to the weight that a base module stores, and puts the original back, bit for bit.

The original parameter is kept and another takes its place, so a module that shares it (tied embeddings) keeps it. Kinds
that store no plain matrix (quantised ones) say how to read W and how to write it back. The rest is the same for all
kinds.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from ..compat.peft import check_adapters_to_merge
from ..errors import MergeError
from .base import AdaptedWeight


class MergeableWeight(AdaptedWeight):
    """An adapted weight that adapters can be merged into.

    Attributes:
        merged_adapters: names of the adapters whose changes are in the stored weight.
    """

    merged_adapters: list[str]
    _original: list[nn.Parameter]
    """What the base stored before merging; in a list, so that the module does not register it."""

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.merged_adapters = []
        self._original = []

    def stored_weight(self) -> nn.Parameter:
        """What the base module stores for W, in the form that `store_weight` takes."""
        return self.base_weight()

    def store_weight(self, stored: nn.Parameter) -> None:
        """Make the base module store `stored`, which has the form that `stored_weight` gives."""
        setattr(self.get_base_layer(), self.parameter_name, stored)

    def in_full(self, stored: nn.Parameter) -> torch.Tensor:
        """W, in fp32 at least and in the shape of the base weight, from what `stored_weight` gives."""
        plain = stored.detach()
        return self.weight_state.full(self, plain.to(torch.promote_types(plain.dtype, torch.float32)))

    def as_stored(self, weight: torch.Tensor, original: nn.Parameter) -> nn.Parameter:
        """A weight (as `in_full` gives it, shape of the base weight) in the form in which `original` is stored."""
        return nn.Parameter(weight.to(original.dtype), requires_grad=original.requires_grad)

    @torch.no_grad()
    def merged_weight(self, names: list[str], safe: bool = False) -> torch.Tensor:
        """W plus the changes of the named adapters, in fp32 at least, in the shape of the base weight.

        Raises:
            ValueError: `safe` is set, and the result holds NaN or infinity.
        """
        total = self.in_full(self._original[0] if self._original else self.stored_weight())
        for name in names:
            total = total + self.get_delta_weight(name).to(total.device)
            if safe and not torch.isfinite(total).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"  # PEFT's wording
                )
        return total

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the changes of the given (default: active) adapters to the base weight, in fp32 at least, rounded once.

        Args:
            safe_merge: look for NaN and infinity before the weight is replaced.
            adapter_names: the adapters to merge. Those already merged are left out, with a warning.

        Raises:
            ValueError: safe_merge found NaN or infinity; the weight is untouched.
            MergeError: the weight is partitioned over processes.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.sorsa_factors]
        if not names:
            return
        original = self._original[0] if self._original else self.stored_weight()
        if original.numel() == 0 and self.out_features and self.in_features:
            raise MergeError(
                f"The weight of {self.name} is partitioned over processes (DeepSpeed ZeRO 3), and merging takes the "
                "whole one. Merge, read and unmerge within deepspeed.zero.GatheredParameters(model.parameters()), as "
                "TRL does; or save the adapter and use `sorsa merge`."
            )
        total = self.merged_weight([*self.merged_adapters, *names], safe_merge)
        self.store_weight(self.as_stored(total, original))
        self._original = [original]  # last: if anything above fails, nothing is merged
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept original weight back, bit for bit, or in the model's dtype if the model was cast since.

        Warns if nothing is merged.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.store_weight(self._as_now(self._original[0]))
        self._original.clear()
        self.merged_adapters.clear()
        self.weight_state.rewrite(self)  # a file may have replaced the initial triplets while it was merged

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base module as it was, or merged; PEFT calls this.

        The original is released at once, because nothing will unmerge: merging a model then holds one original at a
        time.
        """
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self._original.clear()
        return self.get_base_layer()

    def unmerge_if_disabled(self) -> None:
        """PEFT's contract: if adapters are disabled while they are merged, the next forward unmerges them."""
        if self.disable_adapters and self.merged:
            self.unmerge()

    def refuse_lost_merge(self) -> None:
        """Check a merged weight before a forward.

        Raises:
            MergeError: FSDP2 gathered its own weight, which lacks the change.
        """
        if hasattr(self._original[0], "device_mesh") and not hasattr(self.base_weight(), "device_mesh"):
            raise MergeError(
                f"{self.name} is merged, and FSDP2 runs its forward with the weight that it sharded, without the "
                "change. Merge to read the weights, as TRL does, and call unmerge_adapter() before the next forward."
            )

    def _as_now(self, stored: nn.Parameter) -> nn.Parameter:
        """The kept weight on the device and in the dtype that the model has now.

        It stays the same object, because another module may share it. Quantised weights bring their scales and keep
        their dtype.
        """
        now = self.base_weight()
        if self.quantised:
            moved = stored.to(now.device)
            return moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=stored.requires_grad)
        if (stored.device, stored.dtype) != (now.device, now.dtype):
            stored.data = stored.data.to(now.device, now.dtype)
        return stored
