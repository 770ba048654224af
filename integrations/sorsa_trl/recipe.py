"""Reads recipes and command lines of `trl sft` and `trl dpo` that have an adapter's options in them."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from sorsa_plugin.errors import AdapterOptionsError, SORSAError
from sorsa_plugin.extend import (
    SPELLINGS,
    VARIANTS,
    VOCABULARY,
    block_names,
    block_note,
    nearest,
    read_options,
    yaml_values,
)
from sorsa_transformers import AdapterArguments

from .requirement import require_trl

require_trl()

from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, SFTConfig  # noqa: E402

from .trl_compat import TrlParser, launch_command_parser  # noqa: E402

TRAINING_ARGUMENTS = {"sft": SFTConfig, "dpo": DPOConfig}
"""{command: class of its training arguments}"""

LORAS = ("lora", "pissa", "olora", "dora", "rslora", "eva", "adalora")
"""Methods that get TRL's defaults for keys that a recipe leaves out, as in `trl sft`."""

SAME_RANK = (*LORAS, "sorsa", "qsorsa", "miss")
"""Methods that share TRL's default rank, so that changing the word does not change the rank."""

HEADER = "# What `sorsa {command}` ran. Again: sorsa {command} --config {name}\n"


@dataclass
class Recipe:
    """A parsed recipe.

    Attributes:
        command: "sft" or "dpo".
        script, training, model, datasets: TRL's dataclasses.
        adapter: options for `setup_adapter`.
        given: every key that the recipe or the command line gave, with its final value.
        from_file, from_command_line: the arguments in them that are for `accelerate launch`.
    """

    command: str
    script: Any
    training: Any
    model: Any
    datasets: Any
    adapter: dict[str, Any]
    given: dict[str, Any]
    from_file: list[str]
    from_command_line: list[str]

    def require_model(self) -> None:
        """Raises AdapterOptionsError if the recipe names no model."""
        if not self.model.model_name_or_path:
            raise AdapterOptionsError("No model: give model_name_or_path, a directory or a hub id.")

    def write(self, directory: Path) -> Path:
        """Write recipe.yaml, which the same command can run again. Returns its path.

        A recipe.yaml that no such command wrote is somebody's own, and stays: then the name is recipe.run.yaml.
        """
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "recipe.yaml"
        if path.exists() and not path.read_bytes().startswith(HEADER.partition("{")[0].encode()):
            path = directory / "recipe.run.yaml"
        text = HEADER.format(command=self.command, name=path) + yaml.safe_dump(self.given, sort_keys=False)
        path.write_text(text, encoding="utf-8")
        return path


class RecipeParser(TrlParser):
    """TRL's parser, which also takes the adapter's options: from `AdapterArguments`, blocks, and Axolotl's spellings.

    Args:
        command: "sft" or "dpo".
    """

    def __init__(self, command: str) -> None:
        self.command = command
        types = (ScriptArguments, TRAINING_ARGUMENTS[command], ModelConfig, DatasetMixtureConfig, AdapterArguments)
        super().__init__(types, prog=f"sorsa {command}")
        self.fields = {item.name: item for kind in types for item in fields(kind)}
        self.from_file: dict[str, Any] = {}
        self.typed: dict[str, Any] = {}

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """TRL's method, which reads a recipe's keys. Keeps them all, and hides the adapter's options from TRL."""
        self.from_file = deepcopy(config)  # the dataclasses replace entries of lists in place
        ours = {*block_names(), *VOCABULARY, *SPELLINGS, *VARIANTS, "lora_target_linear"} - set(self.fields)
        rest = {key: value for key, value in config.items() if key not in ours}
        if isinstance(rest.get("adapter_options"), Mapping):
            rest.pop("adapter_options")
        return super().set_defaults_with_config(**rest)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's method. Notes which options the command line gave, as opposed to defaults.

        The learning rate that the method's block names takes the place of the recipe's, not of the command line's. It
        does so here, because training arguments hand theirs on when they are made, to DeepSpeed's config for one.
        """
        unset = object()
        blank = Namespace(**dict.fromkeys(self.fields, unset))
        seen, _ = super().parse_known_args(args, blank)
        self.typed = {name: value for name, value in vars(seen).items() if value is not unset}
        parsed, rest = super().parse_known_args(args, namespace)
        rate = read_options(_adapter_options({**self.from_file, **self.typed})).learning_rate
        if rate is not None and "learning_rate" not in self.typed:
            parsed.learning_rate = rate
        return parsed, rest

    def parse(self, args: Iterable[str]) -> Recipe:
        """Parse a command line, with the recipe that its --config names.

        Raises:
            AdapterOptionsError: the recipe cannot be read, neither this command nor `accelerate launch` knows one of
                its keys, the training arguments refuse a value, or an argument belongs to no option.
        """
        arguments = list(args)
        if arguments[-1:] == ["--config"]:
            raise AdapterOptionsError("--config names no file; expected that of a recipe after it.")
        try:
            _require_mappings(arguments)
            *parts, from_file, from_command_line = self.parse_args_and_config(
                arguments, return_remaining_strings=True, separate_remaining_strings=True
            )
        except SORSAError:
            raise
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise AdapterOptionsError(f"The recipe or the arguments cannot be honoured: {error}") from error
        self._check_launch_arguments([*from_file, *from_command_line])
        script, training, model, datasets, _ = parts
        given = {**self.from_file, **self.typed}
        adapter = _adapter_options(given)
        return Recipe(self.command, script, training, model, datasets, adapter, given, from_file, from_command_line)

    def _check_launch_arguments(self, strings: list[str]) -> None:
        parser = launch_command_parser()
        parser.add_argument("--accelerate_config", "--accelerate-config")  # TRL's
        launch = vars(parser.parse_args(["script"]))
        for string in strings:
            name = re.sub(r"=.*", "", string).removeprefix("--").replace("-", "_")
            if string.startswith("--") and name not in launch:
                known = [*self.fields, *VOCABULARY, *SPELLINGS, *block_names(), *launch]
                raise AdapterOptionsError(
                    f"{name!r} is an option neither of `sorsa {self.command}` nor of `accelerate launch`."
                    f"{block_note(name) or nearest(name, known)} `sorsa {self.command} --help` and "
                    f"`trl {self.command} --help` list them."
                )
        script = parser.parse_known_args([*strings, "script"])[0].training_script
        if script != "script":
            raise AdapterOptionsError(
                f"{script!r} is the value of no option; expected --config recipe.yaml and options, which begin with --."
            )


def _require_mappings(arguments: list[str]) -> None:
    """Raises ValueError if the recipe is no mapping, or its datasets are no list of them, which TRL does not check."""
    path = dict(pairwise(arguments)).get("--config")
    content = yaml_values(Path(path).read_text(encoding="utf-8")) if path else {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected lines such as `adapter: sorsa`.")
    mixed = content.get("datasets", [])
    if not isinstance(mixed, list) or not all(isinstance(entry, Mapping) for entry in mixed):
        raise ValueError(f"datasets is {str(mixed)[:100]!r}; expected a list such as [{{path: trl-lib/Capybara}}].")


def _adapter_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says about its adapter, with the defaults that TRL gives LoRA.

    TRL read the recipe as YAML 1.1, in which 4e-4 is a word. Written out and read again by `yaml_values`, it is a
    number.
    """
    model_fields = {item.name: item for item in fields(ModelConfig)}
    ours = {item.name for item in fields(AdapterArguments)}
    keys = {*block_names(), *VOCABULARY, *SPELLINGS, *VARIANTS, *ours, "lora_target_linear"}
    options = yaml_values(yaml.safe_dump({key: value for key, value in given.items() if key in keys}))
    options["adapter"] = options.get("adapter") or ("lora" if given.get("use_peft") else "full")
    defaults = {name: item.default for name, item in model_fields.items() if item.default is not MISSING}
    for word in ("r", "alpha", "dropout", "task_type"):
        applies = options["adapter"] in (SAME_RANK if word == "r" else LORAS) or word == "task_type"
        if applies and word not in options and f"lora_{word}" not in options:
            options[word] = defaults[f"lora_{word}"]
    return options
