"""Equal short training on a quantised base: the quickstart's task, held-out loss before and after, by method and rate.

    python benchmarks/quantization_training.py --steps 60

nf4 with double quantisation, rank 16, every linear layer. "in full" is the unquantised base. QPiSSA trains LoRA's two
factors, from sqrt(S) V^T and U sqrt(S), on the residual base that QSORSA has.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import Chart, Table, publish
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DataCollatorForSeq2Seq, Trainer, set_seed

from sorsa_plugin import SORSAConfig
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_plugin.layers.unwrapped import without_adapters
from sorsa_quickstart import run as quickstart
from sorsa_quickstart.answering import BASE, load_base
from sorsa_quickstart.task import test_examples, train_examples
from sorsa_transformers.data import encode_all

RATES = (2e-3, 5e-3, 1e-2)
METHODS = ("LoRA in full", "QLoRA", "QPiSSA", "SORSA in full", "SORSA on nf4", "QSORSA")


def base(quantised: bool) -> nn.Module:
    if not quantised:
        return load_base()[0]
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(BASE, quantization_config=config, dtype=torch.float32, device_map="cpu")


def build(method: str) -> nn.Module:
    model = base(quantised=not method.endswith("in full"))
    if "LoRA" in method:
        return get_peft_model(model, quickstart.adapter_config("lora", None))
    residual = method in ("QPiSSA", "QSORSA")
    options: dict[str, Any] = {"r": quickstart.RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, SORSAConfig(residual_base=residual, **options))
    return qpissa(adapted, options) if method == "QPiSSA" else adapted


@torch.no_grad()
def qpissa(adapted: Any, options: dict[str, Any]) -> nn.Module:
    """LoRA on the quantised residual base of another model, from its triplets."""
    triplets = {layer.name: layer.get_factors() for layer in sorsa_layers(adapted)}
    inner = adapted.base_model.model
    with without_adapters(inner):
        own = {name: inner.get_submodule(name) for name in triplets}
    for name, module in own.items():
        inner.set_submodule(name, module)
    del inner.peft_config
    model = get_peft_model(inner, LoraConfig(lora_alpha=options["r"], **options))
    for name, (U, S, V) in triplets.items():
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.copy_((V * S.sqrt()).mT)
        layer.lora_B["default"].weight.copy_(U * S.sqrt())
    return model


def train(method: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    set_seed(options.seed)
    tokenizer = load_base()[1]
    model = build(method)
    data = encode_all(train_examples(options.steps * quickstart.BATCH), tokenizer, max_length=256)
    held_out = test_examples(options.questions)
    arguments = quickstart.training_arguments(Path("runs/quantization"), options.steps, options.seed, rate)
    arguments.disable_tqdm = True
    collator = DataCollatorForSeq2Seq(tokenizer)
    held_out_data = encode_all(held_out, tokenizer, max_length=256)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=held_out_data, data_collator=collator)
    model.train()  # evaluated so too (there is no dropout): bitsandbytes repacks LoRA's 4-bit bases in eval mode
    before = loss_of(model, trainer)
    trainer.train()
    after = loss_of(model, trainer)
    row = {"method": method, "rate": rate, "before": before, "after": after}
    print(row, flush=True)
    return row


@torch.no_grad()
def loss_of(model: nn.Module, trainer: Trainer) -> float:
    model.train()
    losses = [(float(model(**batch).loss), len(batch["labels"])) for batch in trainer.get_eval_dataloader()]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def table(result: dict[str, Any]) -> Table:
    rows = []
    for method in METHODS:
        own = [row for row in result["rows"] if row["method"] == method]
        best = min(own, key=lambda row: row["after"])
        rows.append([method, f"{own[0]['before']:.4f}", *(f"{row['after']:.4f}" for row in own), f"{best['rate']:g}"])
    columns = ["method", "before", *(f"lr {rate:g}" for rate in RATES), "best rate"]
    return Table(f"held-out loss after {result['steps']} steps, nf4, rank {quickstart.RANK}", columns, rows)


def charts(result: dict[str, Any]) -> list[Chart]:
    best = [min(row["after"] for row in result["rows"] if row["method"] == method) for method in METHODS]
    return [Chart("held-out loss at the best rate", "loss", list(METHODS), {"after": best})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = [train(method, rate, options) for method in METHODS for rate in RATES]
    result = {"steps": options.steps, "seed": options.seed, "rows": rows}
    publish("quantization_training", "cpu", result, table(result), charts(result))


if __name__ == "__main__":
    main()
