"""What is installed, whether it is in the supported range, and whether PEFT and the plug-ins know each other.

The ranges are those of this package's own metadata: there is no second list of them.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from peft.utils import PeftType

from ..compat.peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from ..config import SORSAConfig
from ..errors import PluginError
from ..plugins import broken, manager
from ..recipes.setup_adapter import registered_adapters
from ..tuner.model import SORSAModel
from ..tuner.registration import NAME

OURS = "sorsa-plugin"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "axolotl", "deepspeed", "bitsandbytes", "torchao")


@dataclass(frozen=True)
class Package:
    """One package of the training stack, or Python itself."""

    name: str
    installed: str | None
    supported: str
    """The range of versions that this package declares; empty where it declares none."""
    needed: bool
    """Whether nothing works without it."""

    @property
    def in_range(self) -> bool:
        """Whether what is installed is in the range; an absent package is not."""
        return self.installed is not None and SpecifierSet(self.supported).contains(self.installed, prereleases=True)

    @property
    def problem(self) -> bool:
        """Whether something has to be done: it is needed and absent, or installed in another version."""
        return not self.in_range and (self.needed or self.installed is not None)

    @property
    def command(self) -> str:
        """What installs a version in range."""
        return f"Python {self.supported}" if self.name == "python" else f'pip install "{self.name}{self.supported}"'


@dataclass(frozen=True)
class Diagnosis:
    """What `sorsa doctor` found."""

    packages: tuple[Package, ...]
    registered: bool
    """Whether PEFT's SORSA is this package's."""
    plugins: tuple[str, ...]
    broken: dict[str, str]
    """{plug-in that could not be loaded or failed: why}."""
    device: str

    @property
    def healthy(self) -> bool:
        """Whether there is nothing to repair."""
        return self.registered and not self.broken and not any(package.problem for package in self.packages)

    def to_json(self) -> dict[str, Any]:
        """The same in JSON's types."""
        packages = {
            package.name: {
                "installed": package.installed,
                "supported": package.supported,
                "needed": package.needed,
                "in_range": package.in_range,
                "command": None if package.in_range else package.command,
            }
            for package in self.packages
        }
        facts = {name: getattr(self, name) for name in ("registered", "plugins", "broken", "device", "healthy")}
        return {OURS: version(OURS), "packages": packages, **facts}


def examine() -> Diagnosis:
    """Look at this process's environment."""
    plugins, broken = _plugins()
    kind = PeftType.__members__.get(NAME)
    registered = (PEFT_TYPE_TO_CONFIG_MAPPING.get(kind), PEFT_TYPE_TO_TUNER_MAPPING.get(kind))
    return Diagnosis(_packages(), registered == (SORSAConfig, SORSAModel), plugins, broken, _device())


def _packages() -> tuple[Package, ...]:
    metadata = distribution(OURS)
    requirements = [Requirement(text) for text in metadata.requires or ()]
    found = [Package("python", platform.python_version(), metadata.metadata["Requires-Python"], needed=True)]
    for name in PACKAGES:
        about = [requirement for requirement in requirements if requirement.name == name]
        ranges = dict.fromkeys(str(requirement.specifier) for requirement in about)
        needed = any(requirement.marker is None for requirement in about)
        found.append(Package(name, _installed(name), ",".join(filter(None, ranges)), needed))
    return tuple(found)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _plugins() -> tuple[tuple[str, ...], dict[str, str]]:
    """The names of the loaded plug-ins, and of those that are broken with the reason."""
    failed = {}
    try:
        registered_adapters()  # asks every plug-in: who fails is noted
    except PluginError as error:
        failed["adapter types"] = str(error)
    loaded = tuple(name for name, plugin in manager().list_name_plugin() if plugin is not None and name not in broken)
    return loaded, failed | {f"{name} ({plugin.distribution})": plugin.error for name, plugin in broken.items()}


def _device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return f"cpu, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if accelerator.type == "cuda" else accelerator.type
    return f"{torch.accelerator.device_count()} x {name} ({accelerator.type})"
