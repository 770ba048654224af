"""Reads a base model's weights after training, one at a time: with adapters of any PEFT type, or in whole models.

PEFT itself makes an adapter's layer, on a model that holds this one module. So the merged weight is what PEFT merges,
also for types that rewrite the base when they start (PiSSA, OLoRA) or scale it (DoRA, IA3), and memory never holds more
than one weight. Merging is in fp32 whatever the base is stored in, so that the rounding of a merged weight does not
count as training.
"""

from __future__ import annotations

import logging
import re
import warnings
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import CONFIG_NAME
from torch import nn

from ...compat.peft import BaseTunerLayer, LoraLayer
from ...compat.transformers import Conv1D
from ...config import SORSAConfig
from ...errors import ForeignAdapterError, IncompleteAdapterError
from ...files.adapter_format import ROOT
from ...files.base_checkpoint import BaseFiles
from ...files.json_values import UNREADABLE
from ...files.run_checkpoints import checkpoints, is_complete
from ...files.saved_adapter import open_tensors, read_config, survey
from ...files.stored_parameters import StoredWeights
from ...layers.layer import SORSALayer
from ...linalg.spectra import product_condition
from ..empty_adapter import ADAPTER
from ..trained_tokens import TRAINED_TOKENS

logger = logging.getLogger(__name__)

NARROWING = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "ensure_weight_tying",
)
"""Options that choose modules in a model. They are cleared here, because the module is chosen already."""


class Trained(NamedTuple):
    """One weight after training."""

    weight: torch.Tensor
    """The merged weight, fp32, in the shape of the base weight."""
    principal_before: float | None = None
    """Condition number of W_p, the product that the adapter trains, at the start; None without such a product."""
    principal_after: float | None = None
    """The same after training."""


class TrainedWeights(Protocol):
    """The trained weights of one adapter or model."""

    modules: list[str]
    """The modules that can be read, in the base's order; their weights have at least two dimensions."""
    partial: bool
    """Whether `modules` are exactly those that were trained. Of a whole model, that is unknown."""

    def read(self, module: str) -> Trained:
        """The module's weight after training; see the classes below for errors."""


class BaseWeights:
    """The base model that everything is compared with.

    Args:
        source: its directory, or id on the hub.
        task_type: one of PEFT's, for the class that it was trained as; None for the class that its config names.
        revision: of the source on the hub.

    Raises:
        BaseFilesError: the base cannot be read tensor by tensor.
    """

    def __init__(
        self, source: str | PathLike[str], task_type: str | None = "CAUSAL_LM", revision: str | None = None
    ) -> None:
        self.files = BaseFiles(source, revision)
        self.model = self.files.empty_model(task_type, torch.float32)
        self.stored = StoredWeights(self.files, self.model)
        own = {name: dict(module.named_parameters(recurse=False)) for name, module in self.model.named_modules()}
        self.with_weight = [name for name, parameters in own.items() if "weight" in parameters]

    def linear_modules(self) -> list[str]:
        """The modules that PEFT's "all-linear" selects: every linear module but the output embedding."""
        output = self.model.get_output_embeddings()
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not output
        ]

    def read(self, module: str) -> torch.Tensor:
        """The module's weight, fp32, in the model's shape: (out x in) of a linear module.

        Raises:
            BaseFilesError: it is not stored, or not in the model's shape.
        """
        return self.stored.read(f"{module}.weight")

    def module(self, name: str) -> nn.Module:
        """A copy of the module with its parameters read from the files, fp32."""
        module = deepcopy(self.model.get_submodule(name))
        for key, _ in list(module.named_parameters(recurse=False)):
            value = self.stored.read(f"{name}.{key}")
            module.register_parameter(key, nn.Parameter(value, requires_grad=False))
        return module


def open_trained(source: str | PathLike[str], base: BaseWeights) -> TrainedWeights:
    """The trained weights in a directory: a PEFT adapter's, or a whole model's.

    Raises:
        ForeignAdapterError: the directory is neither, or its tensors belong to no module of the base, or to no matrix.
        IncompleteAdapterError, BaseFilesError: files are absent or damaged.
    """
    path = Path(source)
    if (path / CONFIG_NAME).is_file():
        return AdapterWeights(path, base)
    if (path / "config.json").is_file():
        return ModelWeights(path, base)
    raise ForeignAdapterError(
        f"{path} holds neither {CONFIG_NAME} nor config.json; expected the directory of a PEFT adapter or of a model."
    )


class ModelWeights:
    """A fully fine-tuned (or merged) model, in the directory `path`."""

    partial = False

    def __init__(self, path: Path, base: BaseWeights) -> None:
        self._stored = StoredWeights(BaseFiles(path), base.model)
        self.modules = base.linear_modules()

    def read(self, module: str) -> Trained:
        """The module's weight in this model.

        Raises:
            BaseFilesError: it is not stored, or not in the base's shape.
        """
        return Trained(self._stored.read(f"{module}.weight"))


class AdapterWeights:
    """A PEFT adapter in the directory `path`.

    Raises:
        ForeignAdapterError, IncompleteAdapterError: see `open_trained`.
    """

    partial = True

    def __init__(self, path: Path, base: BaseWeights) -> None:
        self._path, self._base = path, base
        self._config = _read_any_config(path)
        self._keys: dict[str, list[str]] = {}
        self._replaced: dict[str, str] = {}
        self._rows: dict[str, str] = {}
        with open_tensors(path) as file:
            for key in file.keys():  # noqa: SIM118
                self._place(key)
            if isinstance(self._config, SORSAConfig):
                self._config = read_config(path)
                survey(file, self._config)
        for name, layout in getattr(self._config, "lora_layouts", {}).items():
            if layout[0] == "tied":  # its weight is the embedding's, and adapted there
                self._replaced.pop(name, None)
        found = {*self._keys, *self._replaced, *self._rows}
        matrices = (name for name in base.with_weight if base.model.get_parameter(f"{name}.weight").ndim > 1)
        self.modules = [name for name in matrices if name in found]
        if not self.modules:
            raise ForeignAdapterError(
                f"{path} holds trained vectors alone; expected matrices, which have singular values."
            )
        if getattr(self._config, "init_lora_weights", None) not in (None, True, False, "pissa", "olora", "gaussian"):
            logger.warning(
                "%s was initialised by init_lora_weights=%r, which PEFT repeats here on fp32 weights; where it is not "
                "repeatable, part of the change below is the difference between the two.",
                path, self._config.init_lora_weights,
            )  # fmt: skip

    def _place(self, key: str) -> None:
        """Find the module that a tensor of the file belongs to."""
        parts = key.removeprefix(ROOT).split(".")
        for length in range(len(parts) - 1, 0, -1):
            module, rest = ".".join(parts[:length]), ".".join(parts[length:])
            if module in self._base.with_weight and key.startswith(ROOT):
                if rest in ("weight", "base_layer.weight"):
                    self._replaced[module] = key
                elif f".{rest}" == TRAINED_TOKENS:
                    self._rows[module] = key
                elif rest not in ("bias", "base_layer.bias"):
                    self._keys.setdefault(module, []).append(key)
                return
        owner = re.split(r"\.(?:sorsa|lora)_", key.removeprefix(ROOT))[0].replace(".base_layer", "")
        if owner in dict(self._base.model.named_modules()):
            raise ForeignAdapterError(
                f"{self._path} holds {key}, of a parameter that is no module's own weight (experts, or an "
                "nn.MultiheadAttention); expected adapters on modules, whose weights are compared here. Use "
                "`sorsa inspect` for the gaps, singular values and changes of such a SORSA adapter."
            )
        raise ForeignAdapterError(
            f"{self._path} holds {key}, which belongs to no module of {type(self._base.model).__name__}. Its base is "
            "another model, or its layers share tensors: then merge it with PEFT, save the model, and give that."
        )

    def read(self, module: str) -> Trained:
        """The module's weight with this adapter merged.

        Raises:
            IncompleteAdapterError: the file lacks tensors of the module, or has too many.
            BaseMismatchError: a SORSA adapter was made from another weight.
        """
        if module not in self._keys:
            return Trained(self._carried(module))
        with open_tensors(self._path) as file:
            tensors = {key: file.get_tensor(key) for key in self._keys[module]}
        model = self._one_layer(module)
        layer = next(layer for layer in model.modules() if isinstance(layer, BaseTunerLayer))
        before = _principal(layer, initial=True)
        result = set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER)
        absent = [key for key in result.missing_keys if f".{ADAPTER}" in key]
        if absent or result.unexpected_keys:
            raise IncompleteAdapterError(
                f"The tensors of {module} in {self._path} are not those of its {CONFIG_NAME}: absent "
                f"{', '.join(absent) or 'none'}; too many {', '.join(result.unexpected_keys) or 'none'}. The two "
                "belong to different adapters: take both from the original run again."
            )
        if isinstance(layer, SORSALayer):
            before = _principal(layer, initial=True)
        after = _principal(layer, initial=False)
        merged = model.merge_and_unload().get_submodule(module)
        return Trained(merged.weight.detach(), before, after)

    def _carried(self, module: str) -> torch.Tensor:
        """The weight of a module that the file holds as a whole, or some rows of which it holds."""
        with open_tensors(self._path) as file:
            if module in self._replaced:
                return file.get_tensor(self._replaced[module]).float()
            rows = file.get_tensor(self._rows[module]).float()
        tokens = self._config.trainable_token_indices
        if isinstance(tokens, dict):
            tokens = next(of_name for name, of_name in tokens.items() if f".{module}".endswith(f".{name}"))
        return self._base.read(module).index_copy(0, torch.tensor(tokens), rows)

    def _one_layer(self, module: str) -> PeftModel:
        """PEFT's model with this adapter, still untrained, on a model of only the one module, under its own name."""
        config = deepcopy(self._config)
        for option in NARROWING:
            if hasattr(config, option):
                setattr(config, option, None)
        config.target_modules = {module}
        config.task_type = config.base_model_name_or_path = None
        root = parent = nn.Module()
        *path, last = module.split(".")
        for name in path:
            child = nn.Module()
            parent.add_module(name, child)
            parent = child
        base: Any = self._base.module(module)
        if module in self._replaced:  # PEFT saves the embeddings that it adapts
            base.weight.data = self._carried(module)
        parent.add_module(last, base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a model without config, and options that were adjusted above
            return get_peft_model(root, config, adapter_name=ADAPTER)


def _principal(layer: Any, initial: bool) -> float | None:
    """Condition number of W_p: U diag(S) V^T of SORSA, the scaled B A of LoRA; None if there is no such product."""
    if isinstance(layer, SORSALayer):
        factors = layer.factors(ADAPTER)
        if factors.pending:
            return None
        U, S, V = (factors.U0, factors.S0, factors.V0) if initial else factors.get()
        return product_condition(U * S, V)
    if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        return product_condition(B.flatten(1), A.flatten(1).mT) if A.ndim == 2 and B.any() else None
    return None


def _read_any_config(path: Path) -> Any:
    try:
        config = PeftConfig.from_pretrained(str(path))
        kind = config.peft_type.value
    except UNREADABLE as error:
        raise IncompleteAdapterError(
            f"{path / CONFIG_NAME} cannot be read as an adapter's configuration ({error!r}). It was damaged, or "
            "written by a newer PEFT or a package that is not imported here."
        ) from error
    if config.is_prompt_learning or not hasattr(config, "target_modules"):
        raise ForeignAdapterError(f"{path} is a {kind} adapter, which changes no weight.")
    return config


def complete_checkpoints(run: str | PathLike[str]) -> dict[int, Path]:
    """{step: directory} of a run's complete checkpoints, in order.

    Raises:
        ForeignAdapterError: the directory has none.
    """
    found = checkpoints(run)
    complete = {step: path for step, path in found.items() if is_complete(path)}
    for path in found.values():
        if path not in complete.values():
            logger.warning("%s is incomplete (no trainer_state.json, or files that are cut off): left out.", path)
    if not complete:
        raise ForeignAdapterError(
            f"{run} holds no complete checkpoint-N directory; expected the output directory of a training run."
        )
    return complete
