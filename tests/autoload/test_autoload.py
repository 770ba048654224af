"""PEFT knows SORSA in scripts that do not import this package, and nothing else is different."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import trained
from builders.letters import letter_tokenizer
from builders.saved import saved_base

SCRIPTS = Path(__file__).with_name("scripts.py")
TOKENS = torch.tensor([[5, 9, 3, 17, 2, 40]])


def run(directory: Path, *arguments: object, **variables: str) -> list[str]:
    """The lines that a fresh Python printed, in a directory without this package; it has to succeed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, cwd=directory, env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A directory with a base and an adapter, and the logits of the last token."""
    directory = tmp_path_factory.mktemp("saved")
    base = saved_base(directory / "base")
    model = trained()
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.task_type = str(base), "CAUSAL_LM"
    model.save_pretrained(directory / "adapter")
    for name in ("base", "adapter"):
        letter_tokenizer().save_pretrained(directory / name)
    with torch.no_grad():
        logits = model(TOKENS).logits[0, -1]
        with model.disable_adapter():
            assert not torch.equal(model(TOKENS).logits[0, -1], logits)
    return directory, logits


@pytest.fixture(scope="module")
def found(expected: tuple[Path, torch.Tensor]) -> dict[str, Any]:
    """What the scripts of `scripts.py` found."""
    directory = expected[0]
    return json.loads(run(directory, SCRIPTS, directory / "base", directory / "adapter")[-1])


ROUTES = ["peft_model", "auto_peft_model", "deep_import", "auto_model", "load_adapter", "in_a_pipeline"]


@pytest.mark.parametrize("route", ROUTES)
def test_every_way_to_load_an_adapter_works_without_an_import(
    route: str, found: dict[str, Any], expected: tuple[Path, torch.Tensor]
) -> None:
    assert found["before"] == []
    assert torch.equal(torch.tensor(found[route]), expected[1])


def test_peft_may_be_imported_before_torch(tmp_path: Path) -> None:
    program = "from peft.utils import PeftType; import sys; print('SORSA' in PeftType.__members__, len(sys.meta_path))"
    (line,) = run(tmp_path, "-c", program)
    assert line.startswith("True")


def test_importing_this_package_is_as_before(found: dict[str, Any]) -> None:
    assert found["this_package_first"] == [True, True, True]


@pytest.mark.parametrize("switch", ["SORSA_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_either_switch_turns_it_off(switch: str, tmp_path: Path) -> None:
    program = "import sys, torch; print(any(type(one).__module__ == 'sorsa_autoload' for one in sys.meta_path))"
    assert run(tmp_path, "-c", program, **{switch: "0"}) == ["False"]


def test_a_failure_is_one_warning_and_peft_works(found: dict[str, Any]) -> None:
    known, said, rank = found["broken_registration"]
    assert known == [False, False, True]
    assert rank == 4
    assert len(said) == 1
    assert "could not be registered with PEFT: ImportError: of another PEFT." in said[0]


def test_an_import_of_peft_that_failed_is_followed_again(found: dict[str, Any]) -> None:
    assert found["failed_import_of_peft"] == ["once", False, [True, True, True]]


def test_without_peft_nothing_happens(found: dict[str, Any]) -> None:
    assert found["no_peft"] == "No module named 'peft'"


def test_importing_torch_imports_nothing_of_weight(tmp_path: Path) -> None:
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "import sorsa_autoload; sorsa_autoload.watch_peft()\n"
        "print('sorsa_autoload' in before, len(set(sys.modules) - before - {'sorsa_autoload'}))"
    )
    assert run(tmp_path, "-c", program, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == ["False 0"]


def test_a_lora_trains_to_the_same_bits_with_and_without(found: dict[str, Any]) -> None:
    (known, with_it), (unknown, without) = found["lora_digest"], found["lora_digest_without"]
    assert (known, unknown) == (True, False)
    assert with_it == without
