"""Reports what is installed, whether versions are supported, and whether PEFT and the plug-ins are set up.

The ranges are those of this package's own metadata; there is no second list of them.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution, entry_points, version
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from peft.utils import PeftType

from ..compat.peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from ..config import SORSAConfig
from ..errors import PluginError
from ..plugins import COMMANDS, BrokenPlugin, answers, broken, distributions, manager, origin
from ..recipes.setup_adapter import registered_adapters
from ..tuner.model import SORSAModel
from ..tuner.registration import NAME, version_conflict

OURS = "sorsa-plugin"
AUTOLOAD_SWITCHES = ("SORSA_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD")
"""Environment variables that keep PEFT from knowing SORSA without an import: ours, and torch's for all packages."""
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
        """Whether the installed version is in the range; False for an absent package."""
        return self.installed is not None and SpecifierSet(self.supported).contains(self.installed, prereleases=True)

    @property
    def problem(self) -> bool:
        """Whether something has to be done: it is needed and absent, or installed in an unsupported version."""
        return not self.in_range and (self.needed or self.installed is not None)

    @property
    def command(self) -> str:
        """The command that installs a version in range."""
        return f"Python {self.supported}" if self.name == "python" else f'pip install "{self.name}{self.supported}"'


@dataclass(frozen=True)
class LoadedPlugin:
    """A plug-in that works."""

    name: str
    distribution: str
    """Name and version of the package that the plug-in came from."""
    hooks: tuple[str, ...]
    adapters: tuple[str, ...]
    """The adapter types that it adds."""


@dataclass(frozen=True)
class Diagnosis:
    """What `sorsa doctor` found."""

    packages: tuple[Package, ...]
    registered: bool
    """Whether PEFT's SORSA is this package's."""
    autoload: str
    """"on" if PEFT knows SORSA in scripts that do not import this package; else why not."""
    plugins: tuple[LoadedPlugin, ...]
    broken: tuple[BrokenPlugin, ...]
    """Plug-ins that could not be loaded or failed."""
    conflict: str | None
    """What two plug-ins, or two packages, contradict each other about; None if all agree."""
    device: str

    @property
    def healthy(self) -> bool:
        """Whether there is nothing to repair."""
        problems = any(package.problem for package in self.packages)
        return self.registered and not self.broken and self.conflict is None and not problems

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
        facts = {name: getattr(self, name) for name in ("registered", "autoload", "conflict", "device", "healthy")}
        return {OURS: version(OURS), "packages": packages, **facts, **self.plugins_to_json()}

    def plugins_to_json(self) -> dict[str, Any]:
        """The plug-ins alone."""
        return {name: [asdict(plugin) for plugin in getattr(self, name)] for name in ("plugins", "broken")}


def examine() -> Diagnosis:
    """Examine this process's environment."""
    plugins, contradiction = _plugins()
    conflict = " ".join(filter(None, (version_conflict(), contradiction))) or None
    kind = PeftType.__members__.get(NAME)
    registered = (PEFT_TYPE_TO_CONFIG_MAPPING.get(kind), PEFT_TYPE_TO_TUNER_MAPPING.get(kind))
    ours = registered == (SORSAConfig, SORSAModel)
    return Diagnosis(_packages(), ours, _autoload(), plugins, tuple(broken.values()), conflict, _device())


def _autoload() -> str:
    off = [name for name in AUTOLOAD_SWITCHES if os.environ.get(name) == "0"]
    if off:
        return f"off: {off[0]}=0; scripts need `import sorsa_plugin`"
    if not any(entry.value.startswith("sorsa_autoload:") for entry in entry_points(group="torch.backends")):
        return f"off: its entry point is not installed; install {OURS} again"
    return "on"


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


def _plugins() -> tuple[tuple[LoadedPlugin, ...], str | None]:
    """The plug-ins that are loaded, and what two of them both claim.

    Calls every plug-in for its adapter types, so that those that fail are noted. Whoever builds the command line notes
    those whose commands fail.
    """
    host = manager()
    offered = {name: tuple(kind.name for kind in kinds) for name, kinds in answers("sorsa_adapters")}
    conflict = None
    try:
        registered_adapters()
    except PluginError as error:
        conflict = str(error)
    loaded = [
        LoadedPlugin(
            name,
            distributions.get(name, OURS),
            tuple(sorted(caller.name for caller in host.get_hookcallers(plugin) or [])),
            offered.get(name, ()),
        )
        for name, plugin in host.list_name_plugin()
        if plugin is not None and name not in broken
    ]
    commands = [
        LoadedPlugin(entry.name, origin(entry), (COMMANDS,), ())
        for entry in entry_points(group=COMMANDS)
        if entry.name not in broken
    ]
    return tuple(loaded + commands), conflict


def _device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return f"cpu, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if accelerator.type == "cuda" else accelerator.type
    return f"{torch.accelerator.device_count()} x {name} ({accelerator.type})"
