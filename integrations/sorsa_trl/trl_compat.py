"""What this package uses of TRL's and accelerate's command lines beyond their documented API.

Seen in TRL 1.9.0 and 1.16.0, accelerate 1.11.0 and 1.15.0.
"""

from __future__ import annotations

from accelerate.commands.launch import launch_command, launch_command_parser
from trl import TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument

ENTRIES = {
    "launch_command": "starts the processes, as `accelerate launch`; gone: start that command",
    "launch_command_parser": "which arguments are accelerate's; gone: read `accelerate launch --help`",
    "resolve_accelerate_config_argument": "TRL's names for accelerate's configs; gone: pass --config_file",
    "TrlParser": "reads recipes and command lines; its methods in `OVERRIDDEN`",
}

OVERRIDDEN = {TrlParser: ("set_defaults_with_config", "parse_known_args", "parse_args_and_config")}
"""{TRL's class: methods that ours extends or calls}."""
