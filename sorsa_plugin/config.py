"""`SORSAConfig`: every option of the method, validated; knows no tensor, model or trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from peft.config import PeftConfig
from peft.utils import PeftType

from .config_checks import check_module_options
from .errors import SORSAConfigError
from .linalg.svd import DEFAULT_ENERGY, SvdMethod
from .lora_options import options_of_lora, own_options, takes_lora_options
from .model_card import CardValues, complete_saved_card

if TYPE_CHECKING:
    from peft import LoraConfig

RegUpdate = Literal["coupled", "decoupled"]
RegSchedule = Literal["lr", "constant"]

DEFAULT_GAMMA: dict[str, float] = {"coupled": 4e-4, "decoupled": 0.1}
"""gamma if the config leaves it None: the published script's for coupled; measured for decoupled
(benchmarks/quickstart_sweep.py)."""

MAX_DECOUPLED_GAMMA = 0.5
"""At 1/2 the decoupled update is one Newton-Schulz step to the nearest orthonormal matrix; larger values overshoot."""


@takes_lora_options
@dataclass
class SORSAConfig(PeftConfig):
    """Configuration of SORSA (https://arxiv.org/abs/2409.00055): the top singular triplets of each weight are trained.

        W = W_r + U diag(S) V^T,    y = x W_r^T + ((x V) * S) U^T + b,    only U, S, V are trained

    LoraConfig's options may be given in place of ours: `lora_dropout` is `sorsa_dropout`. Those that mean nothing here
    (`lora_alpha`, `use_rslora`, `alpha_pattern`, `init_lora_weights`) are logged in one line: S is trained, so there is
    no scale. `bias="none"` is what SORSA does: a trained bias would break "disabled adapter = base model".

    Args:
        r: rank, the number of singular triplets trained per weight (out x in); min(in, out) of
            a weight that has fewer.
        target_modules: module names, a regular expression, "all-linear", or None for PEFT's defaults per architecture.
        target_parameters: names of parameters to adapt that are no layer's weight: the experts of mixture-of-experts
            models, e.g. ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"].
        exclude_modules: module names or a regular expression to leave out.
        sorsa_dropout: dropout probability on the input of the change, in [0, 1).
        fan_in_fan_out: True if the targeted layers store their weight as (in, out), as transformers' Conv1D does.
        modules_to_save: further modules that are trained in full and saved with the adapter.
        trainable_token_indices: rows of the embedding that are trained in full; a list, or {embedding's name: list}.
        ensure_weight_tying: if the model ties its output layer to its embedding and one of them is in target_modules or
            modules_to_save, adapt or train both as one.
        layers_to_transform: layer index or indices to adapt; None adapts all.
        layers_pattern: name of the layer list, needed only if `layers_to_transform` cannot find it.
        rank_pattern: {module name or regular expression: rank} for modules whose rank differs from `r`; at most
            min(in, out) of each of these modules.
        init_weights: True starts from the singular triplets (the output equals the base model's); False starts from
            random factors, which is for tests only.
        svd: "exact", "randomized" (seeded block iteration), or "auto": exact if that is cheap.
        svd_seed: seed of the randomized factorisation; the global random state is never touched.
        svd_energy: the randomized factorisation stops when it estimates to have captured this share, in (0, 1), of the
            energy (sum sigma_i^2) of the best r triplets; None is 0.998. Not with svd="exact", which captures all.
        residual_base: on a quantised base only (QSORSA): the base stores the quantised residual W - U0 S0 V0^T,
            computed from the full-precision weights when the adapter is new; see `residual.py`.
        full_precision_base: with residual_base, the directory or hub id of these weights. None: the place that the base
            model was loaded from, which is then filled in.
        gamma: learning rate of the orthonormal regularizer, >= 0, in the optimizer's units. None is the default of the
            chosen update (coupled 4e-4, the published script's). 0 turns the regularizer off.
        reg_update: "coupled" (the paper's: gamma/eta_max * dL_reg/dP joins the gradient once per optimizer step, after
            clipping) or "decoupled" (after the step P <- P - gamma_t P (P^T P - I); 0 <= gamma <= 1/2).
        reg_schedule: decoupled only; "lr" (gamma follows the learning rate's schedule, the default) or "constant".

    Raises:
        SORSAConfigError: an option has a value that cannot be honoured.
        LoraOptionError: an option is one of LoraConfig's that cannot be honoured, such as use_dora=True.
        UnknownOptionError: an option is neither ours nor LoraConfig's.
    """

    r: int = field(default=8, metadata={"help": "Rank: the number of singular triplets trained per weight."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Module names, a regular expression, 'all-linear', or None for PEFT's defaults."},
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters that are no layer's weight, such as stacks of experts."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names or a regular expression to leave out."}
    )
    sorsa_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input of the change."})
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "True when the targeted layers store their weight as (in, out)."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained in full and saved with the adapter."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embedding that are trained in full."}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Adapt or train tied embeddings and output layers as one."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layer index or indices to adapt; None adapts all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list that layers_to_transform counts in."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module names or regular expressions whose rank differs from r."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: singular triplets of the weight; False: random factors (tests only)."}
    )
    svd: SvdMethod = field(default="auto", metadata={"help": "How weights are factorised."})
    svd_seed: int = field(default=0, metadata={"help": "Seed of the randomized factorisation."})
    svd_energy: float | None = field(
        default=None, metadata={"help": "Share of the best triplets' energy where the randomized factorisation stops."}
    )
    gamma: float | None = field(
        default=None, metadata={"help": "Learning rate of the orthonormal regularizer; None: the update's default."}
    )
    reg_update: RegUpdate = field(
        default="coupled", metadata={"help": "'coupled' joins the gradient; 'decoupled' acts after the step."}
    )
    reg_schedule: RegSchedule | None = field(
        default=None, metadata={"help": "Decoupled only: 'lr' follows the learning rate's schedule, or 'constant'."}
    )
    residual_base: bool = field(
        default=False, metadata={"help": "QSORSA: a quantised base stores the quantised residual W - U0 S0 V0^T."}
    )
    full_precision_base: str | None = field(
        default=None, metadata={"help": "QSORSA: directory or hub id of the full-precision weights."}
    )
    base_storage: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "Filled in: how the adapted base weights were stored when the adapter was made; by layer "
            "where they differ."
        },
    )
    lora_layouts: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Filled in: how adapted layers that are not linear are exported to LoRA."},
    )
    adapted_layers: dict[str, int] | None = field(
        default=None,
        metadata={"help": "Filled in: number of adapted layers by their layout, to notice a file that lacks some."},
    )

    @classmethod
    def from_lora(cls, lora_config: LoraConfig, **overrides: Any) -> SORSAConfig:
        """The config that says what a LoraConfig says: rank, targets, dropout and all else that both methods have.

        Logs one line on what means nothing to SORSA, such as lora_alpha.

        Args:
            lora_config: of LoRA itself; it stays as it is.
            overrides: options of this class that take the place of those, or are added (gamma, svd, ...).

        Raises:
            SORSAConfigError: the LoraConfig or an override cannot be honoured.
        """
        return cls(**{**options_of_lora(lora_config, cls), **own_options(overrides, cls)})

    def __post_init__(self) -> None:
        # A config read from an adapter's directory awaits its factors from there. PeftConfig.from_pretrained gives it
        # away: peft_type is the JSON's plain string, and the version that wrote the file is set. A field of our own
        # would not do: files written without one have to load, and PEFT reads them without asking this class.
        given: Any = self.peft_type  # type: ignore[has-type]
        self.factors_from_file: bool = type(given) is str and self.peft_version is not None
        super().__post_init__()
        self.peft_type = PeftType.SORSA
        check_module_options(self)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if self.ensure_weight_tying:  # PEFT fills these in when it finds tied modules
            self.modules_to_tie: Any = None
            self.target_modules_to_tie: Any = None
        self.lora_layouts = self.lora_layouts or {}
        self._check_rank()
        self._check_choices()
        self._check_regularizer()
        self._check_residual()

    @property
    def resolved_gamma(self) -> float:
        """gamma, or the default of the chosen update if it is None."""
        return DEFAULT_GAMMA[self.reg_update] if self.gamma is None else self.gamma

    @property
    def resolved_svd_energy(self) -> float:
        """svd_energy, or its default if it is None."""
        return DEFAULT_ENERGY if self.svd_energy is None else self.svd_energy

    @property
    def resolved_reg_schedule(self) -> str:
        """reg_schedule, or its default "lr" if it is None."""
        return self.reg_schedule or "lr"

    def storage_of(self, layer: str) -> str | None:
        """How the base weight of a layer was stored when the adapter was made; None if unknown."""
        return self.base_storage.get(layer) if isinstance(self.base_storage, dict) else self.base_storage

    @property
    def storages(self) -> str | None:
        """How the base weights were stored, in words; None if unknown."""
        known = self.base_storage
        return " and ".join(sorted(set(known.values()))) if isinstance(known, dict) else known

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and SORSA's section into the model card that PEFT has just written beside it."""
        super().save_pretrained(save_directory, **kwargs)
        if "auto_mapping_dict" in kwargs:  # PEFT's models pass this and write a card; transformers' do neither
            complete_saved_card(save_directory, self.card_values(kwargs["auto_mapping_dict"]))

    def card_values(self, auto_mapping: dict[str, str] | None = None) -> CardValues:
        """What a model card says about an adapter with this config.

        Args:
            auto_mapping: PEFT's name for the base model's class, which it saves where there is no task type; default:
                this config's own.
        """
        mapping = auto_mapping or self.auto_mapping or {}
        named = "base_model_class" in mapping and "parent_library" in mapping
        return CardValues(
            gamma=self.resolved_gamma,
            update=self.reg_update,
            rank=self.r,
            base=self.base_model_name_or_path,
            residual_storage=(self.storages or "not known") if self.residual_base else None,
            full_precision_base=self.full_precision_base,
            task_type=self.task_type,
            base_class=(mapping["parent_library"], mapping["base_model_class"]) if named else None,
        )

    def _check_rank(self) -> None:
        ranks: dict[str, Any] = {"r": self.r}
        self.rank_pattern = self.rank_pattern or {}
        ranks.update({f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()})
        for name, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise SORSAConfigError(f"{name} is {rank!r}; expected an integer >= 1. Give the number of triplets.")

    def _check_choices(self) -> None:
        choices = {"svd": SvdMethod, "reg_update": RegUpdate}
        if self.reg_schedule is not None:
            choices["reg_schedule"] = RegSchedule
        for name, literal in choices.items():
            value, known = getattr(self, name), get_args(literal)
            if value not in known:
                raise SORSAConfigError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}.")
        if not isinstance(self.init_weights, bool):
            raise SORSAConfigError(
                f"init_weights is {self.init_weights!r}; expected True or False. How the weights are factorised is "
                "chosen by `svd`."
            )
        if type(self.svd_seed) is not int or not 0 <= self.svd_seed < 2**63:  # torch's generators take no more
            raise SORSAConfigError(f"svd_seed is {self.svd_seed!r}; expected an integer >= 0 and below 2^63.")
        if self.svd_energy is not None:
            if not _is_number(self.svd_energy) or not 0.0 < self.svd_energy < 1.0:
                raise SORSAConfigError(f"svd_energy is {self.svd_energy!r}; expected a share in (0, 1), such as 0.99.")
            if self.svd == "exact":
                raise SORSAConfigError(
                    f"svd_energy={self.svd_energy} with svd='exact', which captures all of the energy. Drop "
                    "svd_energy, or choose svd='randomized' or 'auto'."
                )
        if not _is_number(self.sorsa_dropout) or not 0.0 <= self.sorsa_dropout < 1.0:
            raise SORSAConfigError(
                f"sorsa_dropout is {self.sorsa_dropout!r}; expected a probability in [0, 1). lora_dropout is the same."
            )

    def _check_regularizer(self) -> None:
        if self.reg_update == "coupled" and self.reg_schedule is not None:
            raise SORSAConfigError(
                f"reg_schedule={self.reg_schedule!r} with reg_update='coupled': the coupled update always follows the "
                "learning rate. Drop reg_schedule, or choose reg_update='decoupled'."
            )
        check_gamma(self.gamma, self.reg_update)

    def _check_residual(self) -> None:
        if not isinstance(self.residual_base, bool):
            raise SORSAConfigError(f"residual_base is {self.residual_base!r}; expected True or False.")
        if self.residual_base and not self.init_weights:
            raise SORSAConfigError(
                "residual_base=True with init_weights=False: a residual is what the singular triplets leave. Drop one."
            )
        if self.full_precision_base is not None and not self.residual_base:
            raise SORSAConfigError(
                f"full_precision_base is {self.full_precision_base!r} without residual_base=True, which alone reads "
                "it. Drop it, or set residual_base=True (adapter: qsorsa)."
            )


def check_gamma(gamma: float | None, reg_update: str) -> None:
    """Check a rate of the regularizer; None stands for the default.

    Raises:
        SORSAConfigError: gamma is no finite number >= 0, or is above 1/2 for the decoupled update.
    """
    if gamma is None:
        return
    if not _is_number(gamma) or not math.isfinite(gamma) or gamma < 0:
        raise SORSAConfigError(f"gamma is {gamma!r}; expected a finite number >= 0, or None for the default.")
    if reg_update == "decoupled" and gamma > MAX_DECOUPLED_GAMMA:
        raise SORSAConfigError(
            f"gamma is {gamma} with reg_update='decoupled'; expected at most {MAX_DECOUPLED_GAMMA}, where one "
            "update reaches the nearest orthonormal matrix. Larger values overshoot."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
