"""Tiny data in LLaMA-Factory's own formats, and its commands in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sorsa_quickstart.answering import BASE

FILES = {
    "sums": [
        {"instruction": f"What is {i} plus {i}?", "input": "", "output": f"{i} + {i} = {2 * i}"} for i in range(40)
    ],
    "pairs": [
        {
            "conversations": [{"from": "human", "value": f"What is {i}+{i}?"}],
            "chosen": {"from": "gpt", "value": str(2 * i)},
            "rejected": {"from": "gpt", "value": "no idea"},
        }
        for i in range(20)
    ],
    "thumbs": [
        {"instruction": f"What is {i}+{i}?", "input": "", "output": str(2 * i), "tag": bool(i % 2)} for i in range(20)
    ],
    "texts": [{"text": f"{i} plus {i} is {2 * i}. " * 6} for i in range(60)],
}

LAYOUTS = {
    "pairs": {
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "thumbs": {"columns": {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "tag"}},
    "texts": {"columns": {"prompt": "text"}},
}

RECIPE = {
    "model_name_or_path": str(BASE),
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "sorsa",
    "lora_rank": 4,
    "lora_target": "all",
    "dataset_dir": "data",
    "dataset": "sums",
    "template": "empty",
    "cutoff_len": 64,
    "logging_steps": 1,
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "use_cpu": True,
    "report_to": "none",
}


def sorsa(
    folder: Path, *arguments: str, typed: str | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`sorsa llamafactory ...`"""
    program = "from sorsa_cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "llamafactory", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        input=typed,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **(environment or {})},
    )
