"""One adapter on one layer: trainable offsets dU, dS, dV from frozen factors U0, S0, V0; knows no layer kind.

Why offsets: U = U0 + dU and so on has the same trajectory as training U, S, V (a constant shift), and

    U diag(S) V^T - U0 diag(S0) V0^T = L R^T,    L = [dU * S, U0],    R = [V, V0 * dS + dV * S]

is exactly zero at init in every dtype. Later, no two large products cancel.

The frozen factors always have the same state-dict keys beside the offsets, so every saved adapter is complete. Whether
they are buffers or parameters depends on the run:

- In one process they are buffers, because PEFT's contract is that every *parameter* of an active adapter trains.
- If a launcher has announced several processes or FSDP, they are parameters without gradient: engines shard those, and
  DDP does not broadcast them again in every forward.
- A plug-in can decide otherwise. DeepSpeed casts parameters to 16 bits and saves no frozen ones.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import FactorsNotLoadedError
from ..files.adapter_format import FROZEN, OFFSETS, complete_names, factor_shapes
from ..linalg.offset_form import Parts, left_to_autograd
from ..linalg.svd import Triplets, product
from .frozen_placement import freeze_again, placed, staying_placed

ROUNDED = (torch.float16, torch.bfloat16)


class SORSAFactors(nn.Module):
    """Offsets and frozen factors of one adapter on one weight (out x in) at rank r; all fp32.

    For a stack of E weights, `stack` is (E,), and every shape below begins with E.

    Attributes:
        dU, dS, dV: trainable offsets, (out x r), (r), (in x r); zero at init.
        U0, S0, V0: frozen initial factors of the same shapes.
        fingerprint: W p of the base weight the factors came from (out); see `fingerprint.py`.
    """

    dU: nn.Parameter
    dS: nn.Parameter
    dV: nn.Parameter
    U0: torch.Tensor
    S0: torch.Tensor
    V0: torch.Tensor
    fingerprint: torch.Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        rank: int,
        device: torch.device | str | None,
        stack: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        shapes = factor_shapes(out_features, in_features, rank, stack)
        options: dict[str, Any] = {"device": device, "dtype": torch.float32}
        for name in OFFSETS:
            setattr(self, name, nn.Parameter(torch.zeros(shapes[name], **options)))
        options["device"] = self.dU.device  # PEFT's low_cpu_mem_usage moves new parameters to the meta device
        for name in FROZEN:
            setattr(self, name, placed(torch.zeros(shapes[name], **options), as_parameter=False))
        self.base_checked = False
        self._accepted: torch.Tensor | None = None
        # The values that a file gave the offsets, in the offsets' own memory. Code that casts with
        # `parameter.data = ...` gives an offset other memory, and these values stay as they were.
        self._as_loaded: dict[str, torch.Tensor] = {}
        self._gradient_sums: list[torch.Tensor] = []  # at most one; a list, because modules set attributes slowly

    @property
    def rank(self) -> int:
        """The rank r: the number of triplets."""
        return self.S0.shape[-1]

    @property
    def trains(self) -> bool:
        """Whether U or V trains; each may be frozen by itself."""
        return any(self._parameters[name].requires_grad for name in ("dU", "dV"))  # type: ignore[union-attr]

    @property
    def pending(self) -> bool:
        """Whether tensors are still to come: from a file, or with the weights of a model on the meta device."""
        return any(getattr(self, name).is_meta for name in (*OFFSETS, *FROZEN))

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The offsets: PEFT sets and reports the flags of what this yields.

        `named_parameters` yields the frozen factors too where they are parameters, and so do a model's `parameters`.
        """
        return (self.get_parameter(name) for name in OFFSETS)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        freeze_again(self, FROZEN)

    def place_frozen(self, as_parameters: bool) -> None:
        """Hold the frozen factors as parameters without gradient, or as buffers, under the same names."""
        for name in FROZEN:
            if name not in (self._parameters if as_parameters else self._buffers):
                tensor = getattr(self, name)
                delattr(self, name)
                setattr(self, name, placed(tensor, as_parameters))

    @torch.no_grad()
    def cast_offsets(self, dtype: torch.dtype) -> None:
        """Give the offsets another dtype in place: the parameters stay the same objects. Gradients are cast along."""
        for name in OFFSETS:
            offset = self.get_parameter(name)
            gradient, offset.grad = offset.grad, None
            offset.data = offset.data.to(dtype)
            offset.grad = None if gradient is None else gradient.to(dtype)

    def restore_fp32(self) -> list[nn.Parameter]:
        """Cast offsets that were rounded to 16 bits (TRL does that on quantised bases) back to fp32.

        They get the exact values of the file that they were loaded from, if the 16-bit values are the rounding of
        those. Else rounded values that are not zero stay as they are, with a warning. Call this before the optimizer
        has state for the offsets.

        Returns:
            The offsets that were cast.
        """
        rounded = {name: getattr(self, name).detach() for name in OFFSETS if getattr(self, name).dtype in ROUNDED}
        if rounded:
            self.cast_offsets(torch.float32)
        for name, value in rounded.items():
            exact = self._as_loaded.get(name)
            if exact is not None and torch.equal(exact.to(value), value):
                getattr(self, name).data = exact
            elif value.any():
                warnings.warn(
                    "Trained SORSA offsets had been rounded to 16 bits, which changes them by up to 0.4%; they go on "
                    "in fp32 from there. Load the adapter from its file to keep them exact.",
                    stacklevel=2,
                )
        self._as_loaded.clear()
        return [self.get_parameter(name) for name in rounded]

    @torch.no_grad()
    def set_initial(self, triplets: Triplets, fingerprint: torch.Tensor) -> None:
        """Copy in the initial triplets U0 (out x r), S0 (r), V0 (in x r) and the fingerprint (out) of their weight.

        The offsets stay as they are.
        """
        for name, value in zip(FROZEN, (*triplets, fingerprint), strict=True):
            getattr(self, name).copy_(value)
        self.base_checked = True

    @torch.no_grad()
    def randomise(self) -> None:
        """Random orthonormal U0, V0 and random offsets, for tests (`init_weights=False`): the change is not zero.

        Draws from the global generator, as PEFT's own `init_weights=False` does: two adapters must differ.
        """
        for name in ("U0", "V0"):
            tensor = getattr(self, name)
            tensor.copy_(torch.linalg.qr(torch.randn(tensor.shape, device=tensor.device))[0])
        self.S0.copy_(1 + torch.rand_like(self.S0))
        for name in OFFSETS:
            offset = getattr(self, name)
            offset.copy_(torch.randn_like(offset) * (0.5 if name == "dS" else offset.shape[-2] ** -0.5))

    def get(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U (out x r), S (r), V (in x r), differentiable with respect to the offsets."""
        return self.parts().current()

    @torch.no_grad()
    def set(self, U: torch.Tensor, S: torch.Tensor, V: torch.Tensor) -> None:
        """Make U (out x r), S (r), V (in x r) the current factors by writing the offsets, up to one fp32 rounding.

        Raises:
            ValueError: a shape differs from that of the factor.
        """
        wanted = dict(zip("USV", (U, S, V), strict=True))
        for name, value in wanted.items():
            expected = getattr(self, f"d{name}").shape
            if value.shape != expected:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; expected {tuple(expected)}, as get_factors() returns."
                )
        for name, value in wanted.items():
            initial = getattr(self, f"{name}0")
            getattr(self, f"d{name}").copy_(value.to(initial) - initial)

    def parts(self) -> Parts:
        """The tensors in the form that `offset_form.py` takes."""
        if self.dS.requires_grad and not left_to_autograd():
            self._watch(self.dS)
        frozen = [self.U0, self.S0, self.V0]
        if any(tensor.requires_grad for tensor in frozen):  # parameters of an engine's own, whose flags somebody set
            frozen = [tensor.detach() for tensor in frozen]
        return Parts(self.dU, self.dS, self.dV, *frozen)

    def _watch(self, dS: Any) -> None:
        """Hook dS so that this process's own gradients of it are summed.

        Called in forward, where engines show the tensor that receives the gradient.
        """
        if getattr(dS, "_sorsa_watched_by", None) == id(self):
            return
        dS._sorsa_watched_by = id(self)  # an id, because the attribute is pickled with the tensor
        here = weakref.ref(self)

        def add(gradient: torch.Tensor) -> None:
            factors = here()
            if factors is not None:
                sums, total = factors._gradient_sums, gradient.detach().sum()
                sums[:] = [sums[0] + total if sums else total]

        dS.register_hook(add)

    def take_gradient_sum(self) -> torch.Tensor | None:
        """The sum of all entries of dL/ddS from this process's backward passes since the last call, not yet reduced.

        Returns:
            A scalar on the device of dS, finite if all entries were finite; None if there was no backward pass.
        """
        return self._gradient_sums.pop() if self._gradient_sums else None

    def low_rank_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """L (out x 2r) and R (in x 2r) with L R^T = U diag(S) V^T - U0 diag(S0) V0^T, in the factors' dtype."""
        return self.parts().pair()

    def initial_matrix(self) -> torch.Tensor:
        """U0 diag(S0) V0^T (out x in), fp32."""
        return product(self.U0, self.S0, self.V0)

    def accept(self, fingerprint: torch.Tensor) -> None:
        """Remember a state dict's fingerprint (out), by identity: the load that takes it need not check the base."""
        self._accepted = fingerprint

    def materialise(self, device: torch.device) -> None:
        """Give pending tensors storage on `device`; the code that loads them fills it."""
        if self.pending:
            self.to_empty(device=device)

    def zero_offsets(self) -> None:
        """Set the offsets to zero, as in an untrained adapter."""
        for name in OFFSETS:
            getattr(self, name).data.zero_()

    def _rounded_by_hand(self) -> bool:
        """Whether trainable offsets were cast to 16 bits one by one, as TRL does.

        Engines do not count: their offsets are views of the engine's flat memory.
        """
        offsets = [self.get_parameter(name) for name in OFFSETS]
        return any(offset.requires_grad for offset in offsets) and all(
            offset.dtype in ROUNDED and type(offset.data) is torch.Tensor
            and offset.untyped_storage().nbytes() == offset.nbytes
            for offset in offsets
        )  # fmt: skip

    def names_in(self, state_dict: Any, prefix: str) -> list[str]:
        """The names of this adapter's tensors in a state dict: all of them or none; see `complete_names`.

        Raises:
            IncompleteAdapterError: some are absent, or have another shape.
        """
        shapes = {name: tuple(getattr(self, name).shape) for name in (*OFFSETS, *FROZEN)}
        return complete_names(state_dict, prefix, shapes)

    def _apply(self, fn: Any, recurse: bool = True) -> SORSAFactors:
        """Follow the model to a device, but never to 16 bits: rounded factors would not be those of the base."""

        def keeping_fp32(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            if tensor.dtype not in ROUNDED and applied.dtype in ROUNDED:
                return tensor.to(applied.device)
            return applied

        try:
            with staying_placed(self, FROZEN):
                super()._apply(keeping_fp32, recurse)
            self._as_loaded = {name: getattr(self, name).data for name in self._as_loaded}
            return self
        except NotImplementedError as error:  # torch raises this for a copy out of the meta device
            raise not_loaded("the adapter", awaited=True) from error

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        """Load all of the adapter's tensors or none, as fp32 whatever dtype the file has."""
        present = self.names_in(state_dict, prefix)
        accepted, self._accepted = self._accepted, None
        checked = bool(present) and accepted is state_dict[prefix + "fingerprint"]
        if local_metadata.get("assign_to_params_buffers", False):  # the given tensors become ours, in their dtype
            state_dict.update({prefix + name: state_dict[prefix + name].float() for name in present})
        elif present:
            if self._rounded_by_hand() and state_dict[prefix + "dS"].dtype == torch.float32:
                self.cast_offsets(torch.float32)  # else loading would round the file's values
            if self.pending:
                self.materialise(state_dict[prefix + "dS"].device)
        with staying_placed(self, FROZEN):
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if present:
            self.base_checked = checked
            self._as_loaded = {name: getattr(self, name).data for name in OFFSETS}


def not_loaded(name: str, awaited: bool) -> FactorsNotLoadedError:
    """The error for using a pending adapter: its file was `awaited`, or its base weight was out of reach."""
    if not awaited:
        return FactorsNotLoadedError(
            f"The weight of {name} was on the meta device (offloaded, or not loaded yet) when the adapter was made, so "
            "it could not be factorised. Load the base model's weights before get_peft_model(), or load a saved "
            "adapter."
        )
    return FactorsNotLoadedError(
        "This SORSA adapter was made from a saved adapter_config.json, so its factors are awaited from the file beside "
        "it, and none were loaded. Load both with PeftModel.from_pretrained(base, directory). To start a new adapter "
        "with the same options, set config.factors_from_file = False before get_peft_model()."
    )
