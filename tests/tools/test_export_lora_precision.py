"""An export within an error that the user names, and in 16 bits: the error that is said is that of the file."""

from __future__ import annotations

import pytest
import torch
from builders.adapters import perturb, trained
from builders.llama import TOKENS, tiny_llama
from builders.one_layer import adapt, make_base, only_layer
from builders.saved import FILE, saved_adapter
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_plugin import export_lora
from sorsa_plugin.errors import IncompleteAdapterError, RankError, SORSAConfigError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directory of a saved adapter of rank 3 on 14 layers."""
    return saved_adapter(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def model():
    return trained(tiny_llama(), rank_pattern={"q_proj": 1})


@pytest.mark.parametrize("error", [0.9, 0.3, 0.05, 1e-3, 1e-9])
def test_the_rank_within_an_error_is_the_smallest(model, tmp_path, error):
    model.save_pretrained(tmp_path / "sorsa")
    report = export_lora(tmp_path / "sorsa", tmp_path / "lora", rank="auto", error=error)
    assert report.relative_error <= error
    if report.rank > 1:
        smaller = export_lora(tmp_path / "sorsa", tmp_path / "smaller", rank=report.rank - 1)
        assert smaller.relative_error > error


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_that_of_the_file_in_its_own_dtype(tmp_path, dtype, rank):
    model = adapt(make_base(shape=(40, 24)), r=4)
    perturb(model)
    model.save_pretrained(tmp_path / "sorsa")
    report = export_lora(tmp_path / "sorsa", tmp_path / "lora", rank=rank, dtype=dtype)
    A, B = (load_file(tmp_path / "lora" / FILE)[f"base_model.model.proj.lora_{part}.weight"] for part in "AB")
    assert A.dtype is B.dtype is DTYPES[dtype]
    L, R = (part.detach().double() for part in only_layer(model).factors("default").low_rank_pair())
    expected = (L @ R.T - B.double() @ A.double()).norm() / (L @ R.T).norm()
    # the report's norm of the difference comes from Gram matrices in float64, which cancel down to the root of 2^-53;
    # in fp32 the last rounding is not counted, which moves the product by (2 u + u^2) sqrt(r) of itself at most
    assert float(expected) == pytest.approx(report.relative_error, abs=1e-7 if dtype != "fp32" else 4 * 2.0**-24)
    assert (report.relative_error == 0) == (dtype == "fp32" and rank == 8)
    words = ["truncated"] * (rank == 2) + [f"rounded to {dtype}"] * (dtype != "fp32")
    assert report.lossy == " and ".join(words)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert (f"{report.relative_error:.3g}, {report.lossy}" if report.lossy else "none, it is exact") in card


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_of_the_bytes_answer_as_the_exact_lora_up_to_the_rounding(model, tmp_path, dtype):
    model.save_pretrained(tmp_path / "sorsa")
    exact = export_lora(tmp_path / "sorsa", tmp_path / "exact")
    half = export_lora(tmp_path / "sorsa", tmp_path / "half", dtype=dtype)
    assert half.rank == exact.rank
    truncated = export_lora(tmp_path / "sorsa", tmp_path / "truncated", rank=exact.rank // 2)
    assert half.bytes < 1.1 * truncated.bytes < 0.7 * exact.bytes
    assert truncated.relative_error > 10 * half.relative_error
    found = []
    for name in ("exact", "half"):
        lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / name).eval()
        found.append(lora(TOKENS).logits.detach())
    change = (found[0] - tiny_llama().eval()(TOKENS).logits).abs().max()
    assert (found[1] - found[0]).abs().max() <= 8 * half.relative_error * change  # two layers of seven, not aligned


def test_an_error_that_rounding_alone_exceeds_is_refused_before_anything_is_written(saved, tmp_path):
    with pytest.raises(RankError, match=r"error is 1e-06, and bf16 alone rounds by about as much.*write fp32"):
        export_lora(saved, tmp_path / "lora", rank="auto", error=1e-6, dtype="bf16")
    assert not any(tmp_path.iterdir())


def test_a_change_too_large_for_a_dtype_is_refused(tmp_path):
    model = adapt(make_base(shape=(8, 8)), r=2)
    perturb(model, scale=1e8)
    model.save_pretrained(tmp_path / "sorsa")
    with pytest.raises(IncompleteAdapterError, match=r"too large for torch.float16. Export it with --dtype bf16"):
        export_lora(tmp_path / "sorsa", tmp_path / "lora", dtype="fp16")
    assert export_lora(tmp_path / "sorsa", tmp_path / "lora", dtype="bf16").relative_error < 2**-7


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rank": "auto"}, RankError, r"error is None; expected a number in \(0, 1\)"),
        ({"rank": "auto", "error": 1.0}, RankError, r"error is 1.0; expected"),
        ({"rank": "auto", "error": True}, RankError, r"error is True; expected"),
        ({"error": 0.1}, RankError, r"error is 0.1 and rank is None; expected an error with rank 'auto' alone"),
        ({"rank": 3, "error": 0.1}, RankError, r"error is 0.1 and rank is 3"),
        ({"dtype": "fp8"}, SORSAConfigError, r"dtype is 'fp8'; expected one of fp32, fp16, bf16"),
    ],
)
def test_options_that_contradict_or_mean_nothing_are_sentences(saved, tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        export_lora(saved, tmp_path / "lora", **options)
    assert not any(tmp_path.iterdir())


def test_the_command_takes_them_and_says_what_is_lost(saved, tmp_path):
    arguments = ["export-lora", str(saved), "-o", str(tmp_path / "lora"), "--rank", "auto", "--error", "0.2"]
    done = CliRunner().invoke(build_app(), [*arguments, "--dtype", "bf16"])
    assert done.exit_code == 0, done.output
    assert "runcated and rounded to bf16: relative error" in done.output.replace("\n", " ")
    done = CliRunner().invoke(build_app(), ["export-lora", str(saved), "-o", str(tmp_path / "x"), "--rank", "many"])
    assert done.exit_code == 1
    assert "rank is 'many'; expected an integer >= 1, 'auto'" in done.output
