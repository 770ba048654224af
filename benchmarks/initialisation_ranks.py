"""Time and memory of a new adapter where 1, 2 and 4 processes share the factorisation.

    python benchmarks/initialisation_ranks.py [--processes 1 2 4] [--hidden 1024] [--layers 8] [--rank 64]

Starts itself under torchrun with gloo on the CPU, one thread a process; once with the whole base in every process, once
with a base that DeepSpeed's `zero.Init` (ZeRO 3) partitioned. Memory is each process's largest resident set during
initialisation, above what it held before: the new factors, and what the factorisation needs for a moment (freed memory
goes back to the system at once here, which glibc otherwise leaves to chance).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(options: argparse.Namespace) -> dict:
    """In every process: build the base, add the adapter."""
    import torch
    from peft import get_peft_model
    from torch import distributed
    from transformers import LlamaConfig, LlamaForCausalLM

    from sorsa_plugin import SORSAConfig
    from sorsa_plugin.files.adapter_format import FROZEN
    from sorsa_plugin.layers.layer import sorsa_layers

    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group("gloo")
    torch.manual_seed(0)
    width = options.hidden
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=options.layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    with partitioned() if options.partitioned else nullcontext():
        model = LlamaForCausalLM(config)
    if distributed.is_initialized():
        distributed.barrier()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    adapted = get_peft_model(model, SORSAConfig(r=options.rank, target_modules="all-linear"))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    digest = hashlib.sha256()
    layers = sorsa_layers(adapted)
    for layer in layers:
        for name in FROZEN:
            digest.update(getattr(layer.factors("default"), name).detach().numpy().tobytes())
    found = {"seconds": seconds, "peak_mib": peak / 1024, "digest": digest.hexdigest()[:16], "layers": len(layers)}
    everyone = [found]
    if distributed.is_initialized():
        everyone = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, found)
        distributed.destroy_process_group()
    return {"processes": everyone}


def partitioned() -> AbstractContextManager[object]:
    """A context in which new parameters are cut into one part a process, as they are made."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage}
    partitioned.announced = HfDeepSpeedConfig(config)  # type: ignore[attr-defined]  # alive as long as this module
    return deepspeed.zero.Init(config_dict_or_path=config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--partitioned", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        found = measure(options)
        if int(os.environ.get("RANK", "0")) == 0:
            options.worker.write_text(json.dumps(found))
        return
    size = ["--hidden", str(options.hidden), "--layers", str(options.layers), "--rank", str(options.rank)]
    runs, kinds = {}, [(n, kind) for kind in ("whole", "partitioned") for n in options.processes]
    for processes, kind in kinds:
        if kind == "partitioned" and processes == 1:
            continue
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "found.json"
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command = [*(launcher if processes > 1 else [sys.executable]), __file__, "--worker", str(file), *size]
            command += ["--partitioned"] if kind == "partitioned" else []
            subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT})
            runs[f"{processes} {kind}"] = json.loads(file.read_text())["processes"]
    from common import Table, publish

    rows = []
    for name, ranks in runs.items():
        slowest, memory = (max(found[key] for found in ranks) for key in ("seconds", "peak_mib"))
        digests = {found["digest"] for found in ranks}
        rows.append([*name.split(), f"{slowest:.1f}", f"{memory:.0f}", str(ranks[0]["layers"]), " ".join(digests)])
    width = f"Llama of {options.layers} layers, d {options.hidden}, r {options.rank}"
    columns = ["processes", "base in each", "seconds", "MiB more a process", "weights", "digest of the factors"]
    settings = {key: value for key, value in vars(options).items() if key not in ("worker", "partitioned")}
    table = Table(f"A new adapter, slowest and largest process: {width}", columns, rows)
    publish("initialisation_ranks", "cpu", {"settings": settings, "runs": runs}, table, [])


if __name__ == "__main__":
    main()
