"""Makes the files beside it: three small adapters as an earlier version saved them, and what they computed there.

Run with sorsa-plugin 0.1.0 at commit 9162727, before its modules moved into folders, with torch 2.13.0, transformers
5.23.0, PEFT 0.21.2 and bitsandbytes 0.50.2, in an environment that has that version:

    OMP_NUM_THREADS=1 PYTHONHASHSEED=0 python tests/promises/data/make.py

Do not run it again to make a failing test pass: the files say what users have on their disks. To compare two versions,
run it with each of them and another directory as its argument: on one machine both write the same bytes. It uses names
of `sorsa_plugin.__all__` and the command line only, so that every version can run it.

    plain/       a Llama, "all-linear"
    experts/     a Mixtral: both stacks of experts, and its embedding, tied with the output layer
    quantised/   a Llama whose base stores nf4 residuals (QSORSA), as save_residual writes it
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, MixtralConfig, PreTrainedConfig

from sorsa_plugin import (
    SORSAConfig,
    attach,
    export_lora,
    merge_adapter,
    merge_and_dequantize,
    quantize_residual,
    save_residual,
)

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0}
BASES: dict[str, PreTrainedConfig] = {
    "plain": LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, **HEADS),
    "experts": MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        **HEADS,
    ),
    "quantised": LlamaConfig(vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=1, **HEADS),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": "all-linear"},
    "experts": {
        "r": 2,
        "target_modules": ["q_proj", "embed_tokens"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "ensure_weight_tying": True,
    },
    # all of them: bitsandbytes packs other layers anew for some CPUs, which rounds them
    "quantised": {"r": 2, "target_modules": "all-linear", "residual_base": True},
}
LAYERS: dict[str, dict[str, str]] = {
    "plain": {
        "model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj.weight": "model.layers.1.mlp.down_proj",
    },
    "experts": {
        "model.layers.0.mlp.experts.down_proj": "model.layers.0.mlp.experts",
        "model.embed_tokens.weight": "model.embed_tokens",
    },
    "quantised": {
        "model.layers.0.self_attn.v_proj.weight": "model.layers.0.self_attn.v_proj",
        "model.layers.0.self_attn.k_proj.weight": "model.layers.0.self_attn.k_proj",
    },
}
"""{parameter of the merged model: its adapted layer}, of the two layers of each adapter that are looked at closely."""

TOKENS = torch.tensor([[3, 12, 9, 4, 11, 8], [1, 5, 5, 14, 2, 13]])


def base_directory(case: Path) -> Path:
    """The base's weights in full precision."""
    return case / "base"


def adapter_directory(case: Path) -> Path:
    """The adapter's two files."""
    return case / "residual" / "adapter" if case.name == "quantised" else case / "adapter"


def load(case: Path) -> PeftModel:
    """The adapter on its base, as users load it."""
    base = case / "residual" if case.name == "quantised" else base_directory(case)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter_directory(case)).eval()


@torch.no_grad()
def measured(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """What users see of an adapted model; it is merged afterwards."""
    found = {"logits": model(TOKENS).logits}
    with model.disable_adapter():
        found["disabled"] = model(TOKENS).logits
    for layer in LAYERS[name].values():
        factors = model.base_model.model.get_submodule(layer).get_factors()
        found |= {f"factors.{layer}.{part}": value.clone() for part, value in zip("USV", factors, strict=True)}
    merged = merge_and_dequantize(model, torch.float32) if name == "quantised" else model.merge_and_unload()
    return found | {f"merged.{weight}": merged.get_parameter(weight).detach().clone() for weight in LAYERS[name]}


def exported(case: Path) -> dict[str, torch.Tensor]:
    """The tensors that `sorsa export-lora` writes."""
    with tempfile.TemporaryDirectory() as directory:
        report = export_lora(adapter_directory(case), Path(directory) / "lora")
        return load_file(report.output / "adapter_model.safetensors")


def looked_at(lora: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Those of `LAYERS` among the tensors of an export."""
    layers = [f"base_model.model.{layer}.lora_" for layer in LAYERS[name].values()]
    return {f"lora.{key}": tensor for key, tensor in lora.items() if key.startswith(tuple(layers))}


def written_merged(case: Path) -> dict[str, torch.Tensor]:
    """What `sorsa merge` writes for the full-precision base."""
    with tempfile.TemporaryDirectory() as directory:
        report = merge_adapter(base_directory(case), adapter_directory(case), Path(directory) / "merged")
        model = AutoModelForCausalLM.from_pretrained(report.output, dtype="auto")
        return {f"written.{name}": model.get_parameter(name).detach().clone() for name in LAYERS[case.name]}


def inspected(case: Path) -> dict[str, Any]:
    """What `sorsa inspect --json` prints, without the directory and the options."""
    from sorsa_cli import main

    arguments, sys.argv = sys.argv, ["sorsa", "inspect", str(adapter_directory(case)), "--json"]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
            main()
    finally:
        sys.argv = arguments
    summary = json.loads(output.getvalue())
    del summary["directory"], summary["config"]
    return summary


def kernels() -> str:
    """What decides in which order sums are taken: where this is the same text, results are the same bits."""
    processor: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            processor.setdefault(key.strip(), value.strip())
    versions = [f"torch {torch.__version__}"]
    for package in ("transformers", "peft", "bitsandbytes"):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    words = [processor.get(key, "?") for key in ("vendor_id", "cpu family", "model", "stepping")]
    return ", ".join([*versions, torch.backends.cpu.get_cpu_capability(), " ".join(words)])


def adapted(case: Path) -> PeftModel:
    """An untrained adapter on the base."""
    config = SORSAConfig(task_type="CAUSAL_LM", **CONFIGS[case.name])
    options: dict[str, Any] = {"dtype": torch.float32}
    if case.name == "quantised":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    base = AutoModelForCausalLM.from_pretrained(base_directory(case), **options)
    return quantize_residual(base, config) if case.name == "quantised" else get_peft_model(base, config)


def train(model: PeftModel) -> None:
    """A few steps with the regularizer, which move every factor by some tenths of its size."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    attach(model, optimizer)
    for _ in range(6):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make(name: str) -> None:
    """One folder of the working directory: named so, no file says where that was."""
    case = Path(name)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(BASES[name], dtype=torch.bfloat16).save_pretrained(base_directory(case))
    model = adapted(case)
    train(model)
    if name == "quantised":
        save_residual(model, case / "residual")
    else:
        model.save_pretrained(adapter_directory(case))
    for written in case.rglob("*"):
        if written.suffix == ".md" or written.name == "generation_config.json":
            written.unlink()
    config_file = adapter_directory(case) / "adapter_config.json"  # save_residual writes the whole path of its output
    config_file.write_text(config_file.read_text(encoding="utf-8").replace(f"{Path.cwd()}/", ""), encoding="utf-8")
    lora = exported(case)
    texts = {"inspection": inspected(case), "lora": {key: list(tensor.shape) for key, tensor in lora.items()}}
    (case / "expected.json").write_text(json.dumps(texts, separators=(",", ":")) + "\n", encoding="utf-8")
    expected = measured(model.eval(), name) | looked_at(lora, name) | written_merged(case)
    expected = {key: tensor.contiguous() for key, tensor in expected.items()}
    save_file(expected, case / "expected.safetensors", {"kernels": kernels()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)
    for name in BASES:
        make(name)
