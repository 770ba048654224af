"""An export of a smaller rank is the nearest LoRA of that rank, and says its error."""

from __future__ import annotations

import pytest
import torch
from builders.adapters import perturb, trained
from builders.llama import tiny_llama
from builders.one_layer import SHAPES, adapt, make_base, only_layer
from builders.saved import FILE, saved_adapter
from safetensors.torch import load_file

from sorsa_plugin import export_lora
from sorsa_plugin.errors import RankError
from sorsa_plugin.layers.layer import sorsa_layers

U32, U16 = 2.0**-24, 2.0**-11
"""Unit roundoff of fp32 and fp16."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directory of a saved adapter of rank 3 on 14 layers; tests copy what they damage."""
    return saved_adapter(tmp_path_factory.mktemp("saved"))


# -- names and layout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("r", "advice"), [(8, None), (9, "--max-lora-rank 32"), (256, "--max-lora-rank 512"), (257, "--rank 512")]
)
def test_a_rank_above_what_vllm_takes_by_default_is_pointed_out(tmp_path, caplog, r, advice):
    adapt(make_base(shape=(300, 300)), r=r, init_weights=False).save_pretrained(tmp_path / "sorsa")
    export_lora(tmp_path / "sorsa", tmp_path / "lora")
    assert (advice in caplog.text) if advice else not caplog.records


# -- truncation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize(("shape", "r"), [*((s, 4) for s in SHAPES.values()), ((40, 6), 5)], ids=str)
def test_the_truncation_error_is_the_optimum_by_svd_of_the_dense_change(tmp_path, shape, r, rank):
    model = adapt(make_base(shape=shape), r=r)
    perturb(model)
    model.save_pretrained(tmp_path / "sorsa")
    report = export_lora(tmp_path / "sorsa", tmp_path / "lora", rank=rank)
    L, R = (part.detach().double() for part in only_layer(model).factors("default").low_rank_pair())
    S = torch.linalg.svdvals(L @ R.T)
    optimum = S[rank:].norm()
    # Both are float64 computations from the same numbers: they differ by 2^-53 S_1 times modest powers of the
    # dimension, far below 1e-12 of the norm.
    assert report.rank == rank
    assert abs(report.relative_error - optimum / S.norm()) <= 1e-12
    assert report.layers[0].relative_error == report.relative_error
    A, B = (load_file(tmp_path / "lora" / FILE)[f"base_model.model.proj.lora_{part}.weight"] for part in "AB")
    # On disk each factor is rounded once: (2u + u^2) |B||A| elementwise, and |B||A| <= sum of S_k in the norm.
    rounding = (2 * U32 + U32**2) * S[:rank].sum() * (1 + U32)
    assert abs((L @ R.T - B.double() @ A.double()).norm() - optimum) <= rounding + 1e-12 * S[0]


def test_the_total_error_is_that_of_all_layers_together_and_whole_layers_stay_whole(tmp_path):
    model = trained(tiny_llama(), rank_pattern={"q_proj": 1})
    model.save_pretrained(tmp_path / "sorsa")
    report = export_lora(tmp_path / "sorsa", tmp_path / "lora", rank=2)
    lost = total = 0.0
    errors = {layer.name: layer.relative_error for layer in report.layers}
    for layer in sorsa_layers(model):
        S = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double())
        lost, total = lost + float(S[2:].square().sum()), total + float(S.square().sum())
        assert (errors[layer.name] == 0) == ("q_proj" in layer.name)
    # the change as get_delta_weight forms it is rounded in fp32, here: 1e-5 covers 2r u with room
    assert report.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-5)


def test_a_rank_that_truncates_nothing_gives_the_exact_file(saved, tmp_path):
    export_lora(saved, tmp_path / "exact")
    report = export_lora(saved, tmp_path / "more", rank=64)
    assert (report.rank, report.relative_error) == (6, 0.0)
    assert (tmp_path / "exact" / FILE).read_bytes() == (tmp_path / "more" / FILE).read_bytes()


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4"])
def test_a_rank_that_is_no_positive_integer_is_an_error_before_anything_is_written(saved, tmp_path, rank):
    with pytest.raises(RankError, match=r"rank is .*; expected an integer >= 1"):
        export_lora(saved, tmp_path / "new" / "lora", rank=rank)
    assert not any(tmp_path.iterdir())
