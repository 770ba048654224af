"""What users write against stays as it is: names, signatures, options and defaults, hooks, and names in files.

`api_surface.json` is the list; it was first written by the code before its modules moved into folders. A new name, or a
change that is meant, goes into it with this command, and a person reads the difference:

    PYTHONPATH=tests python tests/promises/test_api_surface.py --write
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.described import described, fields, ours, signature
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import sorsa_plugin
from sorsa_plugin import SORSAConfig, SORSALayer, attach, errors, hookspecs, plugins

FILE = Path(__file__).parent / "api_surface.json"
WRITE = "PYTHONPATH=tests python tests/promises/test_api_surface.py --write"

TRANSFORMERS = ["AdapterArguments", "SORSACallback", "convert_checkpoint", "last_complete_checkpoint"]
TRL = ["SORSADPOTrainer", "SORSASFTTrainer", "with_orthonormal_loss"]


# -- the surface -----------------------------------------------------------------------------------------------------


def python_names() -> dict[str, Any]:
    return {
        name: described(getattr(sorsa_plugin, name), name)
        for name in sorted(sorsa_plugin.__all__)
        if hasattr(sorsa_plugin, name)
    }


def error_classes() -> dict[str, list[str]]:
    """{error: its bases}."""
    found = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and ours(kind)}
    return {name: [base.__name__ for base in kind.__bases__] for name, kind in sorted(found.items())}


def hooks() -> dict[str, str]:
    """{hook: its signature}, and the name under which plug-ins are found."""
    found = {name: value for name, value in vars(hookspecs).items() if name.startswith("sorsa_")}
    return {name: signature(value) for name, value in sorted(found.items())} | {"entry-point group": plugins.GROUP}


def commands() -> dict[str, Any]:
    """The console script, what of the command line can be imported, and the plug-ins that the package brings."""
    from sorsa_cli import main

    groups = {group: entry_points(group=group) for group in ("console_scripts", plugins.GROUP, plugins.COMMANDS)}
    own = {
        f"{group}: {entry.name}": entry.value
        for group, entries in groups.items()
        for entry in entries
        if entry.dist is not None and entry.dist.name == "sorsa-plugin"
    }
    return dict(sorted(own.items())) | {"sorsa_cli:main": signature(main)}


def integration(package: str, names: list[str]) -> dict[str, Any]:
    module = importlib.import_module(package)
    return {name: described(getattr(module, name), name) for name in names if hasattr(module, name)}


def class_names() -> dict[str, str]:
    """PEFT takes a layer for a linear one by "Linear" in its class's name, and for a parameter's by "ParamWrapper"."""
    kinds = nn.Module()
    kinds.linear, kinds.conv1d, kinds.stack = nn.Linear(4, 4), Conv1D(4, 4), nn.Parameter(torch.randn(2, 4, 4))
    options = {"target_modules": ["linear", "conv1d"], "target_parameters": ["inner.stack"], "fan_in_fan_out": True}
    model = get_peft_model(nn.ModuleDict({"inner": kinds}), SORSAConfig(r=2, **options))
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    tied = get_peft_model(llama(tie_word_embeddings=True), SORSAConfig(r=2, **options))
    return shown_to_peft(model) | {"tied lm_head": shown_to_peft(tied)["lm_head"]}


def class_names_of_bitsandbytes() -> dict[str, str]:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    layers = {"4bit": Linear4bit(64, 64), "8bit": Linear8bitLt(64, 64, has_fp16_weights=False)}
    model = nn.ModuleDict(layers).to("cpu")
    return shown_to_peft(get_peft_model(model, SORSAConfig(r=2, target_modules=list(layers))))


def class_names_of_torchao() -> dict[str, str]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.ModuleDict({"int8": nn.Linear(64, 64)})
    quantize_(model, Int8WeightOnlyConfig())
    return shown_to_peft(get_peft_model(model, SORSAConfig(r=2, target_modules=["int8"])))


def shown_to_peft(model: nn.Module) -> dict[str, str]:
    layers = {layer.name: type(layer).__name__ for layer in model.modules() if isinstance(layer, SORSALayer)}
    return {layer: "...Linear..." if "Linear" in name else name for layer, name in sorted(layers.items())}


def llama(size: int = 8, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "hidden_size": size, "intermediate_size": size, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, **options))


def on_disk() -> dict[str, Any]:
    """Names in an adapter's file, in an optimizer's state and in the config of a model that stores residuals."""
    model = get_peft_model(llama(), SORSAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attach(model, optimizer)
    model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        keys = sorted(load_file(Path(directory) / "adapter_model.safetensors"))
        options = json.loads((Path(directory) / "adapter_config.json").read_text(encoding="utf-8"))
    layer = "base_model.model.model.layers.0.self_attn.q_proj."
    return {
        "tensors of a layer": [key.replace(layer, "<layer>.") for key in keys],
        "keys of a parameter group": sorted(key for key in optimizer.param_groups[0] if key.startswith("sorsa")),
        "peft_type": options["peft_type"],
        "options": sorted(options.keys() & fields(SORSAConfig).keys()),
    }


def residual_names() -> dict[str, Any]:
    """Where a model that stores residuals says so."""
    from transformers import BitsAndBytesConfig

    from sorsa_plugin import quantize_residual, save_residual

    with tempfile.TemporaryDirectory() as directory:
        base, output = Path(directory) / "base", Path(directory) / "residual"
        llama(64).save_pretrained(base)
        four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = LlamaForCausalLM.from_pretrained(base, quantization_config=four_bits, dtype=torch.float32)
        save_residual(quantize_residual(model, SORSAConfig(r=2, target_modules=["q_proj"])), output)
        options = json.loads((output / "config.json").read_text(encoding="utf-8"))
        marks = {key: sorted(value) for key, value in options.items() if key.startswith("sorsa")}
        return {
            "keys of config.json": marks,
            "folders": sorted(path.name for path in output.iterdir() if path.is_dir()),
        }


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "sorsa_plugin": python_names,
    "sorsa_plugin.errors": error_classes,
    "hooks": hooks,
    "entry points": commands,
    "sorsa_transformers": lambda: integration("sorsa_transformers", TRANSFORMERS),
    "sorsa_trl": lambda: integration("sorsa_trl", TRL),
    "sorsa_axolotl": lambda: integration("sorsa_axolotl", ["SORSAPlugin"]),
    "sorsa_axolotl.args": lambda: integration("sorsa_axolotl.args", ["SORSAArgs", "SORSABlock"]),
    "class names": class_names,
    "class names, bitsandbytes": class_names_of_bitsandbytes,
    "class names, torchao": class_names_of_torchao,
    "names in files": on_disk,
    "names in a residual model": residual_names,
}
NEEDS = {
    "sorsa_trl": "trl",
    "sorsa_axolotl": "axolotl",
    "sorsa_axolotl.args": "axolotl",
    "class names, bitsandbytes": "bitsandbytes",
    "class names, torchao": "torchao",
    "names in a residual model": "bitsandbytes",
}
"""{section: the package without which it cannot be looked at}"""


def installed(section: str) -> bool:
    return section not in NEEDS or importlib.util.find_spec(NEEDS[section]) is not None


def listed() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


# -- the tests -------------------------------------------------------------------------------------------------------


def differences(found: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """A sentence on each, which says what to do."""
    gone = [f"{name} is gone, and users rely on it: put it back." for name in known if name not in found]
    new = [
        f"{name} is new, and not in api_surface.json: add it with `{WRITE}`, and keep it from then on."
        for name in found
        if name not in known
    ]
    changed = [
        f"{name} has changed, and users rely on it: it was\n    {known[name]}\nand is\n    {found[name]}\nPut it back; "
        f"a change that is meant goes into the changelog and, with `{WRITE}`, into api_surface.json."
        for name in known
        if name in found and found[name] != known[name]
    ]
    return gone + changed + new


def parameters() -> list[Any]:
    marks = {section: [pytest.mark.axolotl] for section in SECTIONS if section.startswith("sorsa_axolotl")}
    return [pytest.param(section, marks=marks.get(section, [])) for section in SECTIONS]


@pytest.mark.filterwarnings(
    "ignore:(Model with|Setting|fan_in_fan_out)"
)  # on tied embeddings, and on both storage orders
@pytest.mark.parametrize("section", parameters())
def test_the_surface_is_the_one_that_is_listed(section: str) -> None:
    if not installed(section):
        pytest.skip(f"{NEEDS[section]} is not installed")
    found = differences(SECTIONS[section](), listed()[section])
    assert not found, "\n".join([f"{section}:", *found])


def test_all_names_of_the_package_are_in_the_list() -> None:
    assert sorted(sorsa_plugin.__all__) == sorted(listed()["sorsa_plugin"])
    assert len(sorsa_plugin.__all__) == len(set(sorsa_plugin.__all__))
    assert all(hasattr(sorsa_plugin, name) for name in sorsa_plugin.__all__)


def test_a_name_that_is_new_gone_or_changed_is_told_with_what_to_do() -> None:
    known = {"attach": "(model)", "plan": "()"}
    assert not differences(dict(known), known)
    (sentence,) = differences({**known, "extra": "()"}, known)
    assert sentence.startswith("extra is new")
    assert WRITE in sentence
    gone, changed = differences({"plan": "(base)"}, known)
    assert gone.startswith("attach is gone")
    assert "it was\n    ()\nand is\n    (base)" in changed


def test_a_signature_is_alike_wherever_its_types_are() -> None:
    def function(one: sorsa_plugin.SORSAConfig | None, *rest: int, two: float = 1e-4) -> dict[str, torch.Tensor]: ...

    assert signature(function) == "(one: SORSAConfig | None, *rest: int, two: float = 0.0001) -> dict[str, Tensor]"


# -- writing ---------------------------------------------------------------------------------------------------------


def write() -> None:
    """Sections of packages that are not installed here stay as they are."""
    kept = listed()
    surface = {name: make() if installed(name) else kept.get(name, {}) for name, make in SECTIONS.items()}
    FILE.write_text(json.dumps(surface, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"Usage: {WRITE}")
    write()
