"""Gets the regularizer into a training step: hooks on the innermost torch optimizer, the one mechanism.

    coupled    before the step   grad(P) += gamma/eta_max * dL_reg/dP
    decoupled  after the step    P <- P - gamma_t P E,   gamma_t = gamma eta_t/eta_max, or gamma ("constant")

There, gradients are reduced over processes, unscaled and clipped. A step that fp16 scaling skips does not get there.
The hooks run once per optimizer step for any gradient accumulation. If `step(closure)` computes the gradients itself,
as in Lightning, coupled adds its own after each call of the closure.

Trainers only find that optimizer. The engine knows where the factors live in it (`engines.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from ..errors import AttachError
from ..linalg.orthonormality import floor
from ..linalg.precision import full_precision
from ..rank_zero import say
from .engines import Engine, Share, WholeFactors, find_engine
from .fp32_factors import require_fp32
from .gaps import Batch, all_gaps, deviations
from .nonfinite_gradients import DIVERGED, Found, GradientWatch, origin, own_gradients
from .optimizers import ETA_MAX, enclosing_steps, only_makes_state, peak_rate
from .trained_factors import Adapter, Factor, trainable_factors, trained_adapters, trained_of


@dataclass(frozen=True)
class Settings:
    """The regularizer's options: those of the active adapters, or a caller's overrides."""

    gamma: float
    update: str
    schedule: str


class Attachment:
    """The regularizer on one optimizer; made by `attach`.

    Attributes:
        layers: the layers whose adapters are regularized while they train. The attachment does not keep them alive.
        steps: optimizer steps visited so far, including warm-up steps with gamma_t = 0.
        eta: learning rate of the last step visited, of the first group with factors.
        since: value of `SORSALayer.adapters_made` at attach; layers that get an adapter later are looked for.
        looked: value of `adapters_made` and number of the optimizer's parameters when new layers were last looked for.
    """

    def __init__(self, layers: Iterable[Any], engine: Engine, gamma: float | None) -> None:
        self.layers = layers
        self.since = 0
        self.looked: tuple[int, int] | None = None
        self.engine = engine
        self.gamma = gamma
        self.steps = 0
        self.eta = 0.0
        self.peak_moved = False
        self.diverged = False
        self.owns_nothing = False
        self.handles: list[Any] = []
        self._stepping: tuple[Settings, list[Factor]] | None = None
        """The settings and all trained factors of the step under way: layers are asked once a step."""
        self.watch = GradientWatch()
        self.own_gradients: dict[str, torch.Tensor] = {}
        self.last_gaps: list[torch.Tensor] = []
        """The gaps that the last step regularized, on their devices; nobody waits for them."""

    @property
    def layers(self) -> list[Any]:
        """The layers that are still alive; see the class."""
        return [layer for reference in self._layers if (layer := reference()) is not None]

    @layers.setter
    def layers(self, layers: Iterable[Any]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]

    def detach(self) -> None:
        """Remove the hooks. The optimizer will not attach by itself again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def settings(self) -> Settings:
        """The options in force.

        Raises:
            AttachError: active adapters disagree.
        """
        return self._settings_of(trained_adapters(self.layers))

    def _settings_of(self, adapters: list[Adapter]) -> Settings:
        configs = {id(config): config for config in (adapter.layer.configs[adapter.name] for adapter in adapters)}
        found = {
            Settings(config.resolved_gamma, config.reg_update, config.resolved_reg_schedule)
            for config in configs.values()
        }
        if len(found) > 1:
            raise AttachError(
                f"The active adapters ask for different regularizers: {sorted(map(str, found))}; expected one gamma, "
                "reg_update and reg_schedule. Activate one of them, or give them the same options."
            )
        options = found.pop() if found else Settings(0.0, "coupled", "lr")
        return options if self.gamma is None else Settings(self.gamma, options.update, options.schedule)

    @torch.compiler.disable
    @torch.no_grad()
    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Coupled: add the regularizer's gradient to the gradients at hand, or make the closure do so. Counts the step.

        Torch calls this hook before each `step`.

        Returns:
            The arguments of `step` with the wrapped closure; None if there is no closure.

        Raises:
            AttachError: active adapters disagree, or the engine cannot serve the factors.
            NonFiniteGradientError: see `nonfinite_gradients.py`.
        """
        if only_makes_state(optimizer, kwargs) or is_part_of_a_step(optimizer):
            return None
        adapters = trained_adapters(self.layers)
        settings = self._settings_of(adapters)
        factors = trained_of(adapters)
        if self.steps == 0 and settings.gamma > 0.0 and factors:
            self._follow_parameters(factors, optimizer)
        begins = self.engine.begins_step()
        self.steps += begins
        self._follow_peak(optimizer)

        @torch.no_grad()
        def take_gradients() -> None:
            shares = self.engine.stepping(factors)
            if begins:
                self.own_gradients = own_gradients(adapters)
                if factors and not shares:
                    self._say_what_rests(factors, optimizer)
            if settings.update == "coupled" and settings.gamma > 0.0:
                self._push(settings, shares, sum(factor.matrices for factor in factors), optimizer)
            # after the regularizer, whose gaps tell its own overflow from a bad batch; a fused optimizer that has
            # found_inf skips steps that are not finite
            if adapters and getattr(optimizer, "found_inf", None) is None:
                self.watch.note(self.steps, optimizer, Found(adapters, self.own_gradients, self.last_gaps))

        def followed(closure: Callable[[], Any]) -> Callable[[], Any]:
            def compute() -> Any:
                loss = closure()
                take_gradients()
                return loss

            return compute

        self._stepping = settings, factors
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": followed(kwargs["closure"])}
        if callable(args[1] if len(args) > 1 else None):  # args[0] is the optimizer itself
            return (args[0], followed(args[1]), *args[2:]), kwargs
        take_gradients()
        return None

    def _say_what_rests(self, factors: list[Factor], optimizer: Optimizer) -> None:
        """Log once that the optimizer owns nothing of what trains now: it was built before the adapter was switched."""
        if not self.owns_nothing and not any(map(self.engine.owns, factors)):
            self.owns_nothing = True
            say("%s owns none of the %d SORSA factors that train now, so its steps do not move them. Unless another "
                "optimizer does, build this one anew: a Trainer does if its `optimizer` is None.",
                type(optimizer).__name__, len(factors))  # fmt: skip

    def name_skipped_step(self, number: int) -> None:
        """Log which process and layers made an engine (DeepSpeed) skip an optimizer step. Every process calls this.

        Args:
            number: of the step, the same on all processes.
        """
        found = origin(own_gradients(trained_adapters(self.layers)), f"skipped step {number}")
        say("Optimizer step %d was left out, because a gradient is not finite. %s", number, found)

    def _follow_parameters(self, factors: list[Factor], optimizer: Optimizer) -> None:
        """Find the engine again if the factors were plain at attach: `accelerator.prepare` may have handed them to
        FSDP2 or DeepSpeed since."""
        if not isinstance(self.engine, WholeFactors):
            return
        engine = find_engine(factors, optimizer)
        if type(engine) is not type(self.engine):
            self.engine = engine
            require_fp32(self.layers, engine)
            engine.shares(factors)  # makes the engine locate them

    def _follow_peak(self, optimizer: Optimizer) -> None:
        """Note this step's rate. A rate above eta_max (a warm-up set by hand, which no key announces) replaces it."""
        rates = [(group, float(group["lr"] or 0.0)) for group in optimizer.param_groups if group.get(ETA_MAX)]
        self.eta = rates[0][1] if rates else self.eta
        for group, rate in rates:
            if group[ETA_MAX] * (1 + 1e-6) < rate:
                if not self.peak_moved:
                    say("The learning rate rose above the peak %g that was read at attach: SORSA's regularizer follows "
                        "the highest rate seen. Call attach() at the peak to avoid this.", group[ETA_MAX])  # fmt: skip
                self.peak_moved = True
                group[ETA_MAX] = rate

    @torch.compiler.disable
    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decoupled: pull every stepped factor towards orthonormality. Torch calls this hook after each `step`."""
        if self._stepping is None or is_part_of_a_step(optimizer):
            return
        (settings, factors), self._stepping = self._stepping, None
        if settings.update == "decoupled" and settings.gamma > 0.0:
            self._pull(settings, self.engine.stepping(factors), optimizer)

    @full_precision()
    @torch.no_grad()
    def _push(self, settings: Settings, shares: list[Share], count: int, optimizer: Optimizer) -> None:
        """Add the gradient of the mean of `count` gaps to that of the loss."""
        loss_scale = getattr(optimizer, "grad_scale", None)  # fused optimizers under fp16 unscale inside the step
        self.last_gaps = []
        for batch, group in _batches(shares):
            weight = settings.gamma / peak_rate(group) * 2.0 / count
            self.last_gaps.append(batch.gaps())
            scale = weight / self.last_gaps[-1].clamp_min(floor(batch.rank))
            if loss_scale is not None:
                scale = scale * loss_scale.to(scale)
            batch.E.mul_(scale[:, None, None])
            batch.add_product_to([share.gradient for share in batch.shares])

    @full_precision()
    @torch.no_grad()
    def _pull(self, settings: Settings, shares: list[Share], optimizer: Optimizer) -> None:
        """Pull stepped factors towards orthonormality."""
        overflow = getattr(optimizer, "found_inf", None)  # 1 if a fused optimizer skipped the step under fp16 scaling
        self.last_gaps = []
        for batch, group in _batches(shares):
            self.last_gaps.append(batch.gaps())
            gamma = settings.gamma
            if settings.schedule == "lr":
                gamma = gamma * float(group["lr"]) / peak_rate(group)
            batch.E.mul_(-gamma if overflow is None else -gamma * (1.0 - overflow.to(batch.E)))
            batch.add_product_to([None if share.gradient is None else share.offset for share in batch.shares])

    @torch.no_grad()
    def penalty(self, optimizer: Optimizer) -> torch.Tensor:
        """What the regularizer adds to the loss now, a scalar on the factors' device; see `metrics` for its units.

        No device synchronisation; a collective if factors are sharded.
        """
        gaps = self.gaps()
        return self._weight(optimizer) * self._loss(gaps)

    def _weight(self, optimizer: Optimizer) -> float:
        """gamma/eta_max."""
        gamma = self.settings().gamma
        eta_max = next((group[ETA_MAX] for group in optimizer.param_groups if group.get(ETA_MAX)), 0.0)
        return gamma / eta_max if gamma > 0.0 and eta_max > 0.0 else 0.0

    def _loss(self, gaps: torch.Tensor) -> torch.Tensor:
        """L_reg (coupled), or the loss that the decoupled update descends, from the gaps of all factors."""
        return gaps.mean() if self.settings().update == "coupled" else gaps.square().sum() / 4

    def metrics(self, optimizer: Optimizer) -> dict[str, float]:
        """gap_mean, gap_max, reg_loss and gamma as of now, under `sorsa/`.

        One device synchronisation; a collective if factors are sharded.

        reg_loss is what the penalty adds to the loss, in the loss's units under plain SGD: gamma/eta_max times L_reg
        (coupled) or times sum 1/4 gap^2 (decoupled). gamma is the rate of the last step.
        """
        settings = self.settings()
        gaps = self.gaps().double().cpu()
        if not float(gaps.max()) <= DIVERGED and not self.diverged:
            self.diverged = True
            say("The largest gap is %g, and that of orthonormal factors is 0: they have diverged. Lower the learning "
                "rate or gamma (%g), and resume from an earlier checkpoint.", gaps.max(), settings.gamma)  # fmt: skip
        weight = self._weight(optimizer)
        follows_lr = settings.update == "coupled" or settings.schedule == "lr"
        return {
            "sorsa/gap_mean": float(gaps.mean()),
            "sorsa/gap_max": float(gaps.max()),
            "sorsa/reg_loss": weight * float(self._loss(gaps)),
            "sorsa/gamma": weight * self.eta if follows_lr else settings.gamma,
        }

    def gaps(self) -> torch.Tensor:
        """gap(P) of the factors that the optimizer owns (n), or one zero; a collective if factors are sharded."""
        shares = self.engine.shares(trainable_factors(self.layers))
        return all_gaps(shares) if shares else torch.zeros(1)


attachments: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Attachment]] = weakref.WeakKeyDictionary()
"""Every optimizer that has been attached to, including detached ones. The values are weak references, because an
attachment holds its optimizer. The optimizer's hooks keep the attachment alive."""


def attachment_of(optimizer: Optimizer) -> Attachment | None:
    """The attachment whose hooks the optimizer has; None if it has none."""
    reference = attachments.get(optimizer)
    attachment = reference() if reference is not None else None
    return attachment if attachment is not None and attachment.handles else None


def is_part_of_a_step(optimizer: Optimizer) -> bool:
    """Whether this step runs inside the step of an attached optimizer, which delivers the regularizer."""
    return any(attachment_of(outer) is not None for outer in enclosing_steps(optimizer))


def _batches(shares: list[Share]) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """The shares in batches of one parameter group, each with that group; without those whose group rests at rate 0."""
    for batch in deviations([share for share in shares if share.group is not None and peak_rate(share.group) > 0.0]):
        group = batch.shares[0].group
        assert group is not None
        yield batch, group
