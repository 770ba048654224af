"""The wheel holds exactly our import packages, complete; in a clean environment it installs, imports and runs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sorsa_plugin
from sorsa_plugin.tools.export_lora import export_lora

ROOT = Path(__file__).parents[2]

PACKAGES = {
    "sorsa_autoload",
    "sorsa_cli",
    "sorsa_plugin",
    "sorsa_transformers",
    "sorsa_distributed",
    "sorsa_trl",
    "sorsa_axolotl",
    "sorsa_llamafactory",
    "sorsa_bitsandbytes",
    "sorsa_torchao",
    "sorsa_quickstart",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    # from a copy: setuptools leaves build/ and *.egg-info in the tree it builds from
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/results/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(directory)]
    subprocess.run([*command, str(source)], check=True)
    return next(directory.glob("*.whl"))


def test_the_wheel_installs_exactly_our_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert top_level == PACKAGES


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    """Modules, types, the base model, templates."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        folder = ROOT / package if (ROOT / package).is_dir() else ROOT / "integrations" / package
        files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
        assert {f"{package}/{path.relative_to(folder)}" for path in files} == {
            name for name in names if name.startswith(f"{package}/")
        }
        assert f"{package}/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """What is imported in a fresh process with this package, and with PEFT alone."""
    names = {}
    for package in ("sorsa_plugin", "peft"):
        code = f"import sys, {package}; print(*sys.modules)"
        environment = os.environ | {"SORSA_AUTOLOAD": "0"}  # or PEFT would bring this package
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        names[package] = done.stdout.splitlines()[-1].split()
    return names


def test_the_core_imports_no_trainer_and_no_integration(imported: dict[str, list[str]]) -> None:
    """PEFT itself imports bitsandbytes where it is installed, so what PEFT brings is not ours."""
    others = {"trl", "axolotl", "bitsandbytes", "torchao", "deepspeed", "llamafactory"}
    others |= PACKAGES - {"sorsa_plugin"}
    ours, pefts = (
        [name for name in imported[package] if name.split(".")[0] in others or name == "transformers.trainer"]
        for package in ("sorsa_plugin", "peft")
    )
    assert ours == pefts


def test_training_loads_no_offline_tool_and_their_names_are_there_all_the_same(imported: dict[str, list[str]]) -> None:
    assert [name for name in imported["sorsa_plugin"] if name.startswith("sorsa_plugin.tools")] == []
    assert set(sorsa_plugin.__all__) <= set(dir(sorsa_plugin))
    assert sorsa_plugin.export_lora is export_lora
    with pytest.raises(AttributeError, match="no attribute 'exprot_lora'"):
        sorsa_plugin.exprot_lora  # noqa: B018


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    code = f"import {', '.join(sorted(PACKAGES))}; from peft import PeftType; print(PeftType.SORSA)"
    result = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "SORSA" in result.stdout
    command = [str(environment / "bin" / "sorsa"), "quickstart", "--steps", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "base weights untouched" in result.stdout


def test_importing_the_core_brings_nothing_that_peft_does_not(imported: dict[str, list[str]]) -> None:
    """Beyond PEFT's own imports: pluggy, and what this package is made of."""
    ours, pefts = (
        {name.split(".")[0] for name in imported[package]} - sys.stdlib_module_names
        for package in ("sorsa_plugin", "peft")
    )
    assert ours - pefts == {"pluggy", "sorsa_plugin"}


def test_importing_the_package_imports_no_plotting(imported: dict[str, list[str]]) -> None:
    assert "matplotlib" not in imported["sorsa_plugin"]
