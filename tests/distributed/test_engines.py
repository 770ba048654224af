"""The same run on one process, DDP, FSDP2 and DeepSpeed ZeRO on two: same trajectory, complete adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders.engine_scenarios import BF16, CLASSES, FP32, GAMMA, SCENARIOS, STEPS, adapter
from builders.processes import report, run
from peft import PeftModel

pytestmark = pytest.mark.distributed

UPDATES = ("coupled", "decoupled", "coupled self-attached", "decoupled self-attached")
TRAINED = {
    "ddp": [*UPDATES, "adamw", "bf16 coupled"],
    "fsdp2": [*UPDATES, "adamw", "attached early", "bf16 decoupled", "ram-efficient", "bf16 base ram-efficient"],
    "zero1": [*UPDATES, "two groups", "bf16 coupled"],
    "zero2": [*UPDATES, "adamw", "two groups", "attached early", "offloaded", "bf16 decoupled"],
    "zero3": ["coupled", "decoupled self-attached", "two groups", "attached early", "offloaded", "bf16 coupled"],
}
SAME_AS = {  # what one process calls it
    "coupled self-attached": "coupled",
    "decoupled self-attached": "decoupled",
    "attached early": "coupled",
    "ram-efficient": "coupled",
    "offloaded": "coupled",
}
ALONE = ["coupled", "decoupled", "adamw", "two groups", "gamma 0", "unclipped"]
ALONE += ["bf16 coupled", "bf16 decoupled", "bf16 base ram-efficient"]


def load_all(output: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in adapter(output).values()])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    run("train_worker.py", 1, str(output), "single", *ALONE)
    return output


@pytest.fixture(scope="module", params=TRAINED)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Name and output of an engine; one launch trains all of its scenarios, because starting takes longest."""
    output = tmp_path_factory.mktemp(request.param)
    run("train_worker.py", 2, str(output), request.param, *TRAINED[request.param], timeout=900)
    return request.param, output


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_follow_the_trajectory_of_one(scenario: str, together: tuple[str, Path], alone: Path) -> None:
    engine, output = together
    if scenario not in TRAINED[engine]:
        pytest.skip("not trained under this engine")
    reference = SAME_AS.get(scenario, scenario)
    found, expected = report(output)[scenario], report(alone)[reference]

    assert found["engine"] == CLASSES[engine]
    assert found["steps"] == expected["steps"] == STEPS
    assert found["factor_broadcasts"] == 0
    assert found["factors"] == 28
    if engine not in ("ddp",):
        assert found["elements_here"] < 0.6 * expected["elements_here"]
    if engine.startswith("zero"):
        assert found["cut_rows"] > 0

    rounded = "bf16" in scenario
    # losses near 4: a few ulp (2.4e-7), or two bf16 roundings (2^-7 each), where the engine computes the loss in bf16
    assert found["losses"] == pytest.approx(expected["losses"], abs=2.0**-6 if rounded else 5e-6)
    # ||E|| changes by at most 2 ||P|| ||dP||, with ||P|| = sqrt(r) = 2 and ||dP|| <= atol sqrt(49 r)
    assert found["gap_mean"] == pytest.approx(expected["gap_mean"], abs=4 * 14 * (BF16 if rounded else FP32))
    values, wanted = adapter(output / scenario), adapter(alone / reference)
    assert values.keys() == wanted.keys()
    # DeepSpeed's bf16 trains bf16 copies of fp32 masters, and the copies are what it saves
    saved_in_bf16 = rounded and engine.startswith("zero")
    for key, tensor in wanted.items():
        assert values[key].dtype == torch.float32 or saved_in_bf16, key
        if not key.endswith(("dU", "dS", "dV")):
            assert torch.equal(values[key], tensor), key
            continue
        atol, rtol = BF16 if rounded else FP32, 2.0**-8 if saved_in_bf16 else 0.0
        torch.testing.assert_close(
            values[key].float(), tensor, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_penalty_and_clipping_in_these_runs_are_large_enough_to_matter(alone: Path) -> None:
    key = "base_model.model.model.layers.0.mlp.down_proj.sorsa_factors.dU"
    coupled = adapter(alone / "coupled")[key]
    for other in ("decoupled", "gamma 0"):
        assert (adapter(alone / other)[key] - coupled).abs().max() > 1e-3, other  # against 5e-6 above
    changed = {name: load_all(alone / name) - load_all(alone / "coupled") for name in ("unclipped", "two groups")}
    assert all(change.abs().max() > 5e-5 for change in changed.values())
    assert min(report(alone)["coupled"]["grad_norms"]) > 0.02
    assert GAMMA > 0


def test_an_adapter_of_two_processes_loads_on_one(together: tuple[str, Path]) -> None:
    from builders.engines import build_model

    engine, output = together
    tokens = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(7))
    base = build_model().eval()
    before = base(tokens).logits
    model = PeftModel.from_pretrained(base, output / "coupled" / "adapter").eval()
    assert (model(tokens).logits - before).abs().max() > 1e-3, engine  # the perturbation and thirty steps


def test_factors_cut_anywhere_have_the_gaps_and_products_of_whole_ones(tmp_path: Path) -> None:
    run("shares_worker.py", 3, str(tmp_path))
    found = report(tmp_path)
    assert found["cuts"] > 20
    assert found["rows_over_three_processes"] > 0
    # entries of P below 5, at most 11 rows: E errs by 11 * 25 ulp (2^-24), a product of 4 terms by 4 * 5 times that,
    # where E is up to 11 * 25
    assert found["gap"] < 4 * 11 * 25 * 2.0**-24
    assert found["product"] < 4 * 5 * 11 * 25 * 2.0**-24 * 4


def test_fsdp1_is_refused_in_words(tmp_path: Path) -> None:
    printed = run("train_worker.py", 2, str(tmp_path), "fsdp1", "coupled", fails=True)
    assert "Use FSDP2" in printed
    printed = run("train_worker.py", 2, str(tmp_path), "fsdp1", "coupled self-attached", fails=True)
    assert "Use FSDP2" in printed
