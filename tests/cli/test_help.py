"""Help and the version come at once: nothing heavy is imported for them, and every name is whole at 80 columns."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sorsa_cli import app as application
from sorsa_cli import build_app
from sorsa_plugin import plugins

HEAVY = ("torch", "peft", "transformers", "trl", "sorsa_plugin")
COMMANDS = typer.main.get_command(build_app()).list_commands(None)

RUN = f"""
import atexit, sys
from sorsa_cli import main
atexit.register(lambda: print("imported:", *(name for name in {HEAVY} if name in sys.modules)))
sys.argv[0] = "sorsa"
main()
"""


def run(*arguments: str, path: Path | None = None) -> tuple[str, list[str]]:
    """Output of the command line in a fresh process, and which heavy packages it imported."""
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{RUN}" if path else RUN
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output, _, names = done.stdout.rpartition("imported:")
    return output, names.split()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    output, imported = run(*arguments)
    assert output.strip()
    assert imported == []


def test_every_command_is_listed_with_its_whole_first_sentence() -> None:
    shown = " ".join(CliRunner().invoke(build_app(), ["--help"], env={"COLUMNS": "80"}).output.split())
    assert {"plan", "init", "merge", "quickstart", "convert-checkpoint", "sft", "dpo"} <= set(COMMANDS)
    group = typer.main.get_command(build_app())
    for name in COMMANDS:
        sentence = re.split(r"\. |\.$|\n\n", group.commands[name].help)[0]
        assert f"{name} {' '.join(sentence.split())}" in shown


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("sft", "dpo")])
def test_option_names_are_whole_on_80_columns(command: str) -> None:
    shown = CliRunner().invoke(build_app(), [command, "--help"], env={"COLUMNS": "80"}).output
    assert max(map(len, shown.splitlines())) <= 80
    parameters = typer.main.get_command(build_app()).commands[command].params
    names = [option for parameter in parameters for option in parameter.opts if option.startswith("--")]
    assert all(re.search(rf"{name}\b", shown) for name in names)


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_training_commands_show_the_adapters_options_and_where_trls_are(command: str) -> None:
    output, imported = run(command, "--help")
    assert imported == []  # so TRL need not be installed
    assert {"--adapter", "--r", "--target_modules", "--adapter_options"} <= set(output.split())
    assert f"trl {command} --help" in output
    assert max(map(len, output.splitlines())) <= 80


# -- the commands of others ------------------------------------------------------------------------------------------

LIGHT = """
import typer
def add_commands(app: typer.Typer) -> None:
    @app.command()
    def greet(name: str) -> None:
        "Greet somebody."
        typer.echo(f"hello {name}")
"""


def install(directory: Path, module: str, source: str) -> None:
    """A stranger's package with a command and a plug-in, by its files alone."""
    (directory / f"{module}.py").write_text(source)
    (directory / "stranger_plugin.py").write_text("import torch\n")
    info = directory / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    groups = {"sorsa_commands": f"{module}:add_commands", "sorsa_plugin": "stranger_plugin"}
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\nstranger = {value}\n" for group, value in groups.items())
    )


def test_a_strangers_command_is_listed_and_imports_nothing_heavy_beside_a_plug_in_that_does(tmp_path: Path) -> None:
    install(tmp_path, "stranger_commands", LIGHT)
    output, imported = run("--help", path=tmp_path)
    assert re.search(r"greet +Greet somebody", output)
    assert imported == []
    assert run("greet", "you", path=tmp_path) == ("hello you\n", [])


def test_a_command_that_cannot_be_loaded_is_named_and_harms_no_other(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    broken = EntryPoint("broken_commands", "no_such_module_anywhere:add", "sorsa_commands")
    found = application.entry_points
    monkeypatch.setattr(plugins, "broken", {})
    monkeypatch.setattr(application, "entry_points", lambda group: [*found(group=group), broken])
    shown = CliRunner().invoke(build_app(), ["--help"])
    assert shown.exit_code == 0
    assert "quickstart" in shown.output
    assert "The plug-in broken_commands of unknown failed" in caplog.text
    assert "no_such_module_anywhere" in plugins.broken["broken_commands"].error
