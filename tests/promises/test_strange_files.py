"""Whatever a file or an option holds, a command works or ends in a sentence: no traceback, no endless work.

Values of every type take the place of every entry of a stranger's files, one at a time, with a fixed seed.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from builders.adapters import trained
from builders.llama import tiny_llama
from builders.saved import CONFIG, FILE, INDEX
from typer.testing import CliRunner

from sorsa_cli import build_app

pytestmark = pytest.mark.slow

VALUES = [
    None, True, False, 0, -1, 1, 3.5, 5, 10**30, 1e18, 1e26, float("nan"), float("inf"), "", "x", "\x00",
    "é" * 300, "(", "../..", "/", [], [5], ["x"], [None], [[]], {}, {"x": 5}, {"x": None}, {"x": ["embedding"]},
    {"(": 3}, {"x": {}}, {"quant_method": 5},
]  # fmt: skip
"""What an entry of a JSON file may become."""

TEXTS = {
    "empty": b"",
    "binary": bytes(range(256)) * 8,
    "truncated": b'{"peft_type": "SORSA", "r": ',
    "a-list": b"[]",
    "a-number": b"5",
    "null": b"null",
    "nested": b"[" * 100_000 + b"]" * 100_000,
    "nested-objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "no-entries": b"{}",
    "a-long-number": b'{"peft_type": "SORSA", "r": ' + b"9" * 10_000 + b"}",
}
"""What a whole JSON file may become."""


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    monkeypatch.setattr("sorsa_plugin.files.base_checkpoint.BUILDING", 3.0)
    monkeypatch.setattr("sorsa_plugin.files.time_limit.SECONDS", 3.0)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    trained(tiny_llama(), target_modules=["embed_tokens", "up_proj", "q_proj"]).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(directory, max_shard_size="40KB")
    assert (directory / INDEX).is_file()
    return directory


def ends_well(*arguments: object) -> str:
    """Run a command; returns what went wrong, or nothing."""
    result = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
    if result.exception is None or isinstance(result.exception, SystemExit):
        return ""
    return f"{' '.join(map(str, arguments[:1]))}: {type(result.exception).__name__}: {str(result.exception)[:150]}"


def commands(adapter: Path, base: Path, output: Path) -> list[tuple[object, ...]]:
    return [
        ("inspect", adapter),
        ("export-lora", adapter, "-o", output / "lora"),
        ("merge", "--base", base, "--adapter", adapter, "-o", output / "merged"),
        ("analyze", "--base", base, "-o", output / "analysis", "--adapter", adapter, "--no-plots"),
    ]


def base_commands(base: Path, output: Path) -> list[tuple[object, ...]]:
    return [
        ("plan", "--model", base, "--rank", 2, "--unit-seconds", 0.1),
        ("init", "--model", base, "-o", output / "new", "--rank", 2),
    ]


def with_file(source: Path, target: Path, name: str, content: bytes | str) -> Path:
    shutil.copytree(source, target)
    path = target / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return target


def entries(path: Path) -> list[str]:
    return sorted(json.loads(path.read_text()))


def mutations(path: Path, count: int, more: tuple[str, ...] = ()) -> list[tuple[str, bytes | str]]:
    """(what was changed, the new content), a sample with a fixed seed; the whole file, and single entries of it."""
    known = json.loads(path.read_text())
    every = [
        (f"{name}={value!r}"[:60], json.dumps(known | {name: value})) for name in (*known, *more) for value in VALUES
    ]
    gone = [(f"without {name}", json.dumps({k: v for k, v in known.items() if k != name})) for name in known]
    sample = random.Random(0).sample(every, min(count, len(every)))
    return [*TEXTS.items(), *gone, *sample]


def test_what_is_not_changed_works(adapter, base, tmp_path):
    for command in [*commands(adapter, base, tmp_path), *base_commands(base, tmp_path)]:
        result = CliRunner().invoke(build_app(), [str(argument) for argument in command])
        assert result.exit_code == 0, result.output


def test_every_adapter_config_ends_in_a_sentence_or_works(adapter, base, tmp_path):
    failed = []
    for number, (name, content) in enumerate(mutations(adapter / CONFIG, 120, ("adapted_layers", "unheard_of"))):
        here = tmp_path / str(number)
        strange = with_file(adapter, here / "adapter", CONFIG, content)
        failed += [f"{name} {problem}" for command in commands(strange, base, here) if (problem := ends_well(*command))]
        shutil.rmtree(here)
    assert not failed, "\n" + "\n".join(failed)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_every_base_ends_in_a_sentence_or_works(adapter, base, tmp_path, name):
    failed = []
    for number, (change, content) in enumerate(mutations(base / name, 60, ("quantization_config", "text_config"))):
        here = tmp_path / str(number)
        strange = with_file(base, here / "base", name, content)
        every = [*commands(adapter, strange, here)[2:], *base_commands(strange, here)]
        failed += [f"{change} {problem}" for command in every if (problem := ends_well(*command))]
        shutil.rmtree(here)
    assert not failed, "\n" + "\n".join(failed)


@pytest.mark.parametrize("name", [FILE, CONFIG])
def test_every_cut_of_an_adapters_file_ends_in_a_sentence(adapter, base, tmp_path, name):
    content = (adapter / name).read_bytes()
    failed = []
    for number in range(8):
        here = tmp_path / str(number)
        strange = with_file(adapter, here / "adapter", name, content[: len(content) * number // 8])
        failed += [problem for command in commands(strange, base, here) if (problem := ends_well(*command))]
    assert not failed, "\n" + "\n".join(failed)


OPTIONS = {
    "plan": [
        "--rank", "--batch", "--length", "--gpus", "--unit-seconds", "--engine", "--optimizer", "--target-modules",
        "--exclude-modules", "--layers", "--rank-pattern", "--modules-to-save", "--task-type", "--dtype", "--revision",
    ],
    "init": [
        "--rank", "--target-modules", "--exclude-modules", "--layers", "--rank-pattern", "--svd", "--svd-seed",
        "--gamma", "--reg-update", "--reg-schedule", "--sorsa-dropout", "--task-type", "--dtype", "--quantize",
        "--target-parameters",
    ],
}  # fmt: skip

WORDS = [
    "",
    "0",
    "-1",
    "nan",
    "inf",
    "1e23",
    "1e26",
    str(10**30),
    "(",
    "x",
    "[",
    "null",
    "q_proj=nan",
    "q_proj=1e9",
    "1-",
]


SAVED = {
    "export-lora": ["--rank", "--error", "--dtype"],
    "analyze": [
        "--modules",
        "--top",
        "--degenerate",
        "--task-type",
        "--adapter",
        "--checkpoints",
        "--html",
        "--revision",
    ],
    "advise": ["--rank", "--lora-lr", "--model"],
}
"""{command on saved files: options}"""


@pytest.mark.parametrize("command", SAVED)
def test_every_option_of_commands_on_saved_files_ends_in_a_sentence_or_works(
    adapter, base, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    usual = {name: arguments for name, *arguments in commands(adapter, base, tmp_path / "out")}
    usual["advise"] = ["--model", base, "--rank", 2]
    failed = []
    for option in SAVED[command]:
        for word in WORDS:
            problem = ends_well(command, *usual[command], option, word)
            failed += [f"{option} {word!r} {problem}"] if problem else []
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert not failed, "\n" + "\n".join(failed)


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_ends_in_a_sentence_or_works(base, tmp_path, command):
    failed = []
    for option in OPTIONS[command]:
        for word in WORDS:
            output = ["-o", tmp_path / "out"] if command == "init" else ["--unit-seconds", "0.1"]
            problem = ends_well(
                command, "--model", base, *output, *([] if option == "--rank" else ["--rank", 2]), option, word
            )
            failed += [f"{option} {word!r} {problem}"] if problem else []
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert not failed, "\n" + "\n".join(failed)
