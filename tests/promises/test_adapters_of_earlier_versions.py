"""Adapters that earlier versions saved load today, and everything that is computed from them is what it was.

The files in `data` were written by an earlier version, with the results that it had. Copies are compared bit for bit.
So are sums on the kind of machine and with the libraries that the files were made with; elsewhere kernels add in
another order, and results may differ by the rounding of fp32.
"""

from __future__ import annotations

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sorsa_plugin import save_residual

DATA = Path(__file__).parent / "data"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
U = 2.0**-24
"""Unit roundoff of fp32."""

# Rounding errors have random signs: a sum of n terms errs by about sqrt(n) U times the sum of their magnitudes (Higham
# and Mary 2019), and that is about sqrt(n) times the sum itself: n U relative. Norms, activations and the residual
# stream pass relative errors on as they are. In a row are at most 13 products: of each block q or k, scores, values, o,
# up and down, and the output layer's. Sums have at most 64 terms, and the adapter's 2r <= 8 more. Two results err.
LOGITS = 2 * 13 * (64 + 8) * U

quantised = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
CASES = ["plain", "experts", pytest.param("quantised", marks=quantised)]
pytestmark = [
    pytest.mark.parametrize("name", CASES),
    pytest.mark.filterwarnings("ignore:(Setting|Model with|Could not find)"),  # PEFT's, on embeddings
]


@lru_cache
def maker() -> ModuleType:
    """The script that made the files: the same functions look at them now."""
    spec = importlib.util.spec_from_file_location("make", DATA / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache
def expected(name: str) -> dict[str, torch.Tensor]:
    return load_file(DATA / name / "expected.safetensors")


@lru_cache
def texts(name: str) -> dict[str, Any]:
    return json.loads((DATA / name / "expected.json").read_text(encoding="utf-8"))


@lru_cache
def found(name: str) -> dict[str, torch.Tensor]:
    return maker().measured(maker().load(DATA / name), name)


def sums_are_the_same(name: str) -> bool:
    """Whether this machine adds in the order in which the expected results were added."""
    with safe_open(DATA / name / "expected.safetensors", "pt") as file:
        return file.metadata()["kernels"] == maker().kernels()


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """`tolerance` bounds the norm of the difference, on other machines."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if sums_are_the_same(name):
        assert torch.equal(found, expected)
    assert float((found.double() - expected.double()).norm()) <= tolerance


def assert_same_bytes(found: Path, expected: Path) -> None:
    """Of every tensor of two files."""
    ours, theirs = load_file(found), load_file(expected)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert ours[key].shape == tensor.shape, key
        assert torch.equal(ours[key].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), key


def pair(name: str, layer: str) -> list[torch.Tensor]:
    """lora_A and lora_B of a layer, as they were exported; balanced, so that both have about the same norm."""
    prefix = f"lora.base_model.model.{layer}.lora_"
    return [tensor for key, tensor in sorted(expected(name).items()) if key.startswith(prefix)]


def merged_tolerance(name: str, weight: str) -> float:
    """||fl(L R^T) - L R^T|| <= k U ||L|| ||R|| for k terms; each term was rounded up to 6 times before, and the sum
    with the weight is rounded once. Scaling L and R by powers of two changes no rounding. Two results err."""
    A, B = pair(name, maker().LAYERS[name][weight])
    rank = 2 * maker().CONFIGS[name]["r"]
    change = (rank + 6) * float(A.double().norm() * B.double().norm())
    return 2 * U * (change + float(expected(name)[f"merged.{weight}"].double().norm()))


def test_factors_are_the_same_bits(name: str) -> None:
    """U = U0 + dU and so on: one fp32 addition, which has one right answer everywhere."""
    keys = [key for key in expected(name) if key.startswith("factors.")]
    assert len(keys) == 6
    for key in keys:
        assert torch.equal(found(name)[key], expected(name)[key]), key


@pytest.mark.parametrize("output", ["logits", "disabled"])
def test_logits_with_and_without_the_adapter_are_the_same(name: str, output: str) -> None:
    logits = expected(name)[output]
    assert_same(found(name)[output], logits, LOGITS * float(logits.norm()), name)


def test_the_tolerance_of_logits_tells_an_adapter_from_none(name: str) -> None:
    logits, disabled = expected(name)["logits"], expected(name)["disabled"]
    assert float((logits - disabled).norm()) > 1000 * LOGITS * float(disabled.norm())


def test_merged_weights_are_the_same(name: str) -> None:
    for weight in maker().LAYERS[name]:
        key = f"merged.{weight}"
        assert_same(found(name)[key], expected(name)[key], merged_tolerance(name, weight), name)


def test_saved_again_the_adapter_is_the_same_file(name: str, tmp_path: Path) -> None:
    model, source = maker().load(DATA / name), maker().adapter_directory(DATA / name)
    model.save_pretrained(tmp_path)
    assert_same_bytes(tmp_path / WEIGHTS, source / WEIGHTS)
    assert options(tmp_path / CONFIG).items() >= options(source / CONFIG).items()


def options(path: Path) -> dict[str, Any]:
    """An adapter's options, without PEFT's version; the order of the targets has no meaning."""
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["peft_version"]
    return config | {"target_modules": sorted(config["target_modules"])}


def test_exported_the_lora_is_the_same(name: str) -> None:
    lora = maker().exported(DATA / name)
    assert {key: list(tensor.shape) for key, tensor in lora.items()} == texts(name)["lora"]
    for key, tensor in maker().looked_at(lora, name).items():
        tolerance = lora_tolerance(name, key) * float(expected(name)[key].double().norm())
        assert_same(tensor, expected(name)[key], tolerance, name)


def lora_tolerance(name: str, key: str) -> float:
    """lora_B is [dU S, U0], whose one product has one right answer. lora_A has V0 dS + dV S, which is rounded three
    times, or twice where the kernel fuses: relative to the sum as much more as its terms cancel. Two results err."""
    if "lora_A" not in key and "lora_embedding_A" not in key:
        return 0.0
    prefix = key.removeprefix("lora.").rpartition(".lora_")[0] + ".sorsa_factors."
    file = load_file(maker().adapter_directory(DATA / name) / WEIGHTS)
    V0, dV, S0, dS = (file[prefix + part].double() for part in ("V0", "dV", "S0", "dS"))
    one, other = V0 * dS.unsqueeze(-2), dV * (S0 + dS).unsqueeze(-2)
    cancellation = (one.abs() + other.abs()).norm(dim=-2) / (one + other).norm(dim=-2)
    return 2 * 3 * U * float(cancellation.max())


def test_merged_into_the_files_of_its_base_it_gives_the_same_weights(name: str) -> None:
    """They are bfloat16: where fp32 sums differ, the nearest number can be the neighbour, 2^-7 away at most."""
    for key, tensor in maker().written_merged(DATA / name).items():
        assert tensor.dtype == torch.bfloat16
        assert_same(tensor, expected(name)[key], 2**-7 * float(expected(name)[key].double().norm()), name)


def test_inspected_it_shows_the_same(name: str) -> None:
    """All numbers are norms and extremes of sums of at most 64 terms, gaps of ones about 1."""
    summary, known = maker().inspected(DATA / name), texts(name)["inspection"]
    if sums_are_the_same(name):
        assert summary == known
    assert numbers(summary) == pytest.approx(numbers(known), rel=64 * U, abs=64 * U)
    assert words(summary) == words(known)


def numbers(summary: dict[str, Any]) -> dict[str, float]:
    layers = {f"{layer['name']} {key}": value for layer in summary["layers"] for key, value in layer.items()}
    return {key: value for key, value in {**summary, **layers}.items() if isinstance(value, (int, float))}


def words(summary: dict[str, Any]) -> list[Any]:
    return [
        summary["dtypes"],
        summary["carried"],
        summary["trained_tokens"],
        [one["name"] for one in summary["layers"]],
    ]


def test_a_residual_model_is_written_in_the_same_form(name: str, tmp_path: Path) -> None:
    """The names and kinds of the tensors that hold the residuals, and the mark in config.json that says so."""
    if name != "quantised":
        pytest.skip("an intact base is not written with its adapter")
    written = save_residual(maker().adapted(DATA / name), tmp_path / "written")
    earlier = DATA / name / "residual"
    ours, theirs = load_file(written / "model.safetensors"), load_file(earlier / "model.safetensors")
    assert kinds(ours) == kinds(theirs)
    if sums_are_the_same(name):
        assert_same_bytes(written / "model.safetensors", earlier / "model.safetensors")
    ours, theirs = (json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (written, earlier))
    assert ours["sorsa_residual"] == theirs["sorsa_residual"] | {"of": str(maker().base_directory(DATA / name))}


def kinds(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Names, dtypes and numbers of dimensions: bitsandbytes keeps some numbers as text, of any length."""
    return {key: (tensor.dtype, tensor.ndim) for key, tensor in tensors.items()}
