"""Bytes that an optimizer step sends and that a process holds, under every engine, beside docs/scaling.md's formulas.

    python benchmarks/distributed_costs.py [--hidden 256] [--layers 4] [--rank 16]

Starts itself under torchrun on two CPU processes. Every collective passes torch's dispatcher, where it is counted; a
step with the regularizer less a step without it is the regularizer's share. Held is what tensors occupy when the inner
optimizer steps, where gradients are reduced and activations gone. fp32, AdamW, one micro-batch, no recomputation.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ENGINES = ("DDP", "FSDP2", "ZeRO 1", "ZeRO 2", "ZeRO 3")
PROCESSES = 2
BUCKET = 100_000
"""Elements of DeepSpeed's reduce bucket; its default of 5e8 would be most of what is held here."""


class Training(NamedTuple):
    """A model under an engine.

    Attributes:
        step: one optimizer step on a batch.
        optimizer: the innermost.
        handles: what has to live as long.
    """

    step: Callable[[], None]
    optimizer: Any
    handles: tuple[Any, ...]


class Collectives(TorchDispatchMode):
    """Counts calls and message bytes: of an all-gather the gathered, of a reduce-scatter the scattered tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        space, _, name = func.name().partition("::")
        if space.endswith(("c10d", "c10d_functional")) and "wait" not in name and "barrier" not in name:
            entry = self.found[kind(name)]
            entry[0] += 1
            entry[1] += max(total(_tensors(group)) for group in (*args[:2], result))
        return result


def kind(operator: str) -> str:
    """all-reduce, all-gather, reduce-scatter, broadcast or the operator's own name."""
    plain = operator.replace("_", "").split(".")[0]
    known = ("allreduce", "allgather", "reducescatter", "broadcast", "reduce")
    found = next((word for word in known if word in plain), plain)
    return {"allreduce": "all-reduce", "allgather": "all-gather", "reducescatter": "reduce-scatter"}.get(found, found)


def build(options: argparse.Namespace) -> torch.nn.Module:
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from sorsa_plugin import SORSAConfig

    torch.manual_seed(0)
    width = options.hidden
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=options.layers,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return get_peft_model(
        LlamaForCausalLM(config), SORSAConfig(r=options.rank, target_modules="all-linear", gamma=4e-4)
    )


def sizes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of the base, the frozen factors and the offsets, before an engine takes them; factors and their r x r."""
    from sorsa_plugin.layers.layer import sorsa_layers
    from sorsa_plugin.regularizer.trained_factors import model_factors

    factors = model_factors(model)
    adapters = [layer.factors("default") for layer in sorsa_layers(model)]
    frozen = [getattr(adapter, name) for adapter in adapters for name in ("U0", "S0", "V0", "fingerprint")]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = {id(tensor) for tensor in (*frozen, *trained)}
    base = [parameter for parameter in model.parameters() if id(parameter) not in own]
    inner = model.get_base_model()  # type: ignore[operator]
    first = inner.model.layers[0]
    attention = [getattr(first.self_attn, name).get_base_layer().weight for name in ("q_proj", "k_proj", "v_proj")]
    return {
        "outermost": total([inner.model.embed_tokens.weight, inner.lm_head.weight, inner.model.norm.weight]),
        "before the first offset": total([inner.model.embed_tokens.weight, first.input_layernorm.weight, *attention]),
        "base": total(base),
        "frozen": total(frozen),
        "trained": total(trained),
        "factors": len(factors),
        "gram": sum(4 * factor.offset.shape[1] ** 2 for factor in factors),
    }


def _tensors(group: Any) -> list[torch.Tensor]:
    return [thing for thing in tree_leaves(group) if isinstance(thing, torch.Tensor)]


def total(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def loss_of(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(distributed.get_rank()))
    return model(input_ids=ids, labels=ids).loss


def data_parallel(model: torch.nn.Module) -> Training:
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    return _plain(wrapped, [wrapped])


def sharded(model: torch.nn.Module) -> Training:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return _plain(fully_shard(model, mesh=mesh), [])


def _plain(model: Any, handles: list[Any]) -> Training:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False)

    def step() -> None:
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Training(step, optimizer, (model, *handles))


def zero(config: Any) -> Callable[[torch.nn.Module], Training]:
    def start(model: torch.nn.Module) -> Training:
        import deepspeed

        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=False)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config.config)

        def step() -> None:
            engine.backward(loss_of(engine))
            engine.step()

        return Training(step, engine.optimizer.optimizer, (engine, config))

    return start


def starter(name: str) -> Callable[[torch.nn.Module], Training]:
    """Announces the engine; to be called before the model is built."""
    if not name.startswith("ZeRO"):
        return data_parallel if name == "DDP" else sharded
    from transformers.integrations import HfDeepSpeedConfig

    stage = int(name[-1])
    at_once = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    released = {f"stage3_{name}": 0 for name in at_once} if stage == 3 else {}  # as the weights of a large model are
    config = HfDeepSpeedConfig(
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, **released},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    )
    return zero(config)


def held() -> int:
    """Bytes of all storages of living tensors."""
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                if local is not None and not local.is_meta:
                    storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """In every process: what steps three (with the regularizer) and four (without it) of an engine send."""
    from sorsa_plugin import attach
    from sorsa_plugin.regularizer.trained_factors import trainable_factors

    gc.collect()
    before, start, model = held(), starter(name), build(options)
    found: dict[str, Any] = sizes(model)
    training = start(model)
    attachment = attach(model, training.optimizer)
    del model
    peaks: list[int] = []
    for _ in range(2):
        training.step()
    hook = training.optimizer.register_step_pre_hook(lambda *_: peaks.append(held() - before))
    training.step()
    hook.remove()
    counts = []
    for gamma in (None, 0.0):
        attachment.gamma = gamma
        with Collectives() as collectives:
            training.step()
        counts.append(dict(collectives.found))
    shares = attachment.engine.shares(trainable_factors(attachment.layers))
    found["cut"] = sum(4 * len(share.cuts) * share.rank for share in shares)
    found |= {"held": max(peaks), "with": counts[0], "without": counts[1], "engine": type(attachment.engine).__name__}
    return found


def worker(options: argparse.Namespace) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = {name: measure(name, options) for name in options.engines}
    if distributed.get_rank() == 0:
        options.worker.write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def predicted(name: str, s: dict[str, int]) -> dict[str, int]:
    """The formulas of docs/scaling.md in bytes: held, sent for training, sent for the regularizer."""
    n, base, frozen, trained, bucket = PROCESSES, s["base"], s["frozen"], s["trained"], 4 * BUCKET
    both = 2 * (base + trained)  # a gather for the forward and one for the backward
    kept, unused = s["outermost"], s["before the first offset"]
    return {
        "DDP": {"held": base + frozen + 4 * trained, "training": trained},
        "FSDP2": {
            "held": (base + frozen + 4 * trained) // n,
            "training": both + 2 * frozen - kept + trained,
        },
        "ZeRO 1": {"held": base + frozen + trained + 4 * trained // n, "training": 2 * trained},
        "ZeRO 2": {"held": base + frozen + trained + 4 * trained // n, "training": 2 * trained},
        "ZeRO 3": {"held": base // n + frozen + 6 * trained // n + bucket, "training": both - unused + trained},
    }[name] | {"regularizer": 0 if name == "DDP" else s["gram"] + s["cut"]}


def sent(counts: dict[str, list[int]]) -> int:
    return sum(size for _, size in counts.values())


def shown(number: float) -> str:
    return f"{number / 1e6:.3f}"


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Of the table: measured and predicted, in MB."""
    table = []
    for name, one in found.items():
        wanted, training = predicted(name, one), sent(one["without"])
        calls = ", ".join(f"{count} {kind}" for kind, (count, _) in sorted(one["without"].items()))
        extra = sum(count for count, _ in one["with"].values()) - sum(count for count, _ in one["without"].values())
        table.append(
            [
                name, shown(one["held"]), shown(wanted["held"]), shown(training), shown(wanted["training"]), calls,
                shown(sent(one["with"]) - training), shown(wanted["regularizer"]), str(extra),
            ]
        )  # fmt: skip
    return table


def run(arguments: list[str], timeout: float = 600) -> dict[str, Any]:
    """Each engine's measurements on two processes."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "found.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
        subprocess.run(
            [*launcher, __file__, "--worker", str(file), *arguments], check=True, timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        return worker(options)
    from common import Table, publish

    found = run(sys.argv[1:])
    columns = [
        "", "held", "formula", "training sends", "formula", "calls", "regularizer sends", "formula", "calls",
    ]  # fmt: skip
    size = f"Llama of {options.layers} layers, d {options.hidden}, r {options.rank}, fp32, {PROCESSES} processes"
    table = Table(f"MB a process and optimizer step: {size}", columns, rows(found))
    publish("distributed_costs", "cpu", {"settings": {"bucket": BUCKET}, "found": found}, table, [])


if __name__ == "__main__":
    main()
