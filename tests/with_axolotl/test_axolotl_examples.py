"""The recipes in examples/axolotl: the tiny one runs as its first lines say, the others pass Axolotl's validation."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("axolotl")

from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from builders.axolotl_runs import ROOT, environment
from safetensors.torch import load_file

pytestmark = pytest.mark.axolotl

EXAMPLES = ROOT / "examples" / "axolotl"
DOCS = ROOT / "docs" / "axolotl.md"
ONE_GPU = re.compile(r"one GPU", re.IGNORECASE)


def uncommented_variant(text: str) -> str:
    """The recipe with its commented variant for several GPUs switched on."""
    recipe, marker, variant = text.partition("# Several GPUs: axolotl train shards over all that it sees.\n")
    return (
        recipe + variant.replace("# fsdp", "fsdp").replace("\n#   ", "\n  ").replace("\n# ddp", "\nddp")
        if marker
        else ""
    )


def recipes() -> dict[str, str]:
    files = {path.name: path.read_text() for path in sorted(EXAMPLES.glob("*.yaml"))}
    variants = {f"{name}, several GPUs": uncommented_variant(text) for name, text in files.items()}
    variants |= {f"{name}, DeepSpeed": with_deepspeed(text) for name, text in files.items()}
    return files | {name: text for name, text in variants.items() if text}


def with_deepspeed(text: str) -> str:
    """The recipe with its commented DeepSpeed line instead of FSDP's."""
    recipe, marker, line = text.partition("# DeepSpeed instead of the lines above, from fsdp_version on;")
    plain = "\n".join(line for line in recipe.split("\nfsdp_version")[0].splitlines() if not line.startswith("#"))
    return plain + "\n" + line.partition("\n")[2].replace("# deepspeed", "deepspeed") if marker else ""


@pytest.mark.parametrize("name", recipes())
def test_axolotl_accepts_the_recipe(name: str) -> None:
    text = recipes()[name]
    sharded, deepspeed = "\nfsdp_config:" in text, name.endswith("DeepSpeed")
    assert sharded == (("fsdp2" in name or "several GPUs" in name) and not deepspeed)
    gpus = 8 if sharded or deepspeed else 1
    capabilities = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": gpus, "compute_capability": "sm_90"}
    cfg = DictDefault(yaml.safe_load(text))
    try:
        prepare_plugins(cfg)
        cfg = validate_config(cfg, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})
    finally:
        PluginManager.get_instance().plugins.clear()
    assert cfg.adapter == ("qsorsa" if "4bit" in name else "sorsa")
    assert cfg.sorsa.gamma == 4e-4
    if deepspeed:
        assert (ROOT / cfg.deepspeed).is_file()
    if sharded:
        assert cfg.fsdp_version == 2
        assert cfg.fsdp_config.transformer_layer_cls_to_wrap
    lora = DictDefault(
        yaml.safe_load(
            text.replace("adapter: sorsa", "adapter: lora").replace("qsorsa #", "qlora #") + "lora_alpha: 16\n"
        )
    )
    prepare_plugins(lora)
    try:
        assert validate_config(lora, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})
    finally:
        PluginManager.get_instance().plugins.clear()


def test_the_recipes_cover_three_families_and_sizes() -> None:
    models = [yaml.safe_load(path.read_text())["base_model"].lower() for path in EXAMPLES.glob("*.yaml")]
    for family, sizes in {
        "llama": ("1b", "8b", "70b"),
        "qwen": ("1.7b", "8b", "72b"),
        "mistral": ("7b", "2407"),
    }.items():
        assert all(any(family in model and size in model for model in models) for size in sizes), family


def test_the_tiny_recipe_trains_and_merges_as_its_first_lines_say(tmp_path: Path) -> None:
    text = (EXAMPLES / "tiny.yaml").read_text()
    commands = [line[2:] for line in text.splitlines() if line.startswith("# axolotl ")]
    assert [command.split()[1] for command in commands] == ["train", "merge-lora"]
    printed = []
    for command in commands:
        arguments = [*shlex.split(command)[1:], f"--output-dir={tmp_path}", f"--dataset-prepared-path={tmp_path / 'p'}"]
        result = subprocess.run(
            [sys.executable, "-m", "axolotl.cli.main", *arguments],
            cwd=ROOT, env=environment(), capture_output=True, text=True,
        )  # fmt: skip
        printed.append(result.stdout + result.stderr)
        assert result.returncode == 0, printed[-1][-4000:]
    first, *_, last = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", printed[0])]
    assert last < first
    assert load_file(tmp_path / "merged" / "model.safetensors")


def test_every_recipe_and_key_that_the_page_names_exists() -> None:
    from sorsa_axolotl.recipe import REFUSED

    page = DOCS.read_text()
    for name in re.findall(r"examples/axolotl/([\w.-]+\.yaml)", page):
        assert (EXAMPLES / name).is_file(), name
    for key in REFUSED:
        assert f"`{key}`" in page, key
