"""What happens to a run on every engine besides training: its weights are merged and read, it is saved in the middle,
one process meets a gradient that is not finite, and its factors take their share of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders.processes import report, run
from peft import PeftModel
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]
ATOL = 2e-6
"""Six steps at a rate of 1e-2 of gradients of norm 1 at most that differ in their last digits (6e-8), of offsets below
0.3 that are rounded once a step (1.5e-8), and of gamma P E, as in test_engines.py: 6 (1e-9 + 1.5e-8 + 4e-8) = 4e-7;
merged weights below 1 are rounded once more (6e-8), and are sums of 8 products of factors below 1.5."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    run("life_worker.py", 1, str(output), "single")
    return output


@pytest.fixture(scope="module", params=ENGINES)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """Name, output and what was printed."""
    output = tmp_path_factory.mktemp(request.param)
    return request.param, output, run("life_worker.py", 2, str(output), request.param)


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=ATOL, msg=lambda text, key=key: f"{key}: {text}")


def test_a_sampler_reads_the_merged_weights_and_training_goes_on_undisturbed(
    together: tuple[str, Path, str], alone: Path
) -> None:
    _, output, _ = together
    expected = load_file(alone / "read.safetensors")
    assert_close(load_file(output / "read.safetensors"), expected)
    from builders.engines import build_model

    base = dict(build_model().named_parameters())
    assert expected.keys() == base.keys()
    changed = [name for name, weight in expected.items() if (weight - base[name]).abs().max() > 100 * ATOL]
    assert len(changed) == 14
    with_reading, without = adapter(output / "adapter"), adapter(output / "undisturbed")
    assert all(torch.equal(with_reading[key], tensor) for key, tensor in without.items())


def test_the_adapter_saved_in_mid_run_is_complete_and_serves_on_one_process(
    together: tuple[str, Path, str], alone: Path, tmp_path: Path
) -> None:
    from builders.engines import build_model

    from sorsa_plugin.tools.export_lora import export_lora

    _, output, _ = together
    middle, final = adapter(output / "middle"), adapter(output / "adapter")
    assert_close(middle, adapter(alone / "middle"))
    assert_close(final, adapter(alone / "adapter"))
    assert any(not torch.equal(middle[key], final[key]) for key in final)
    export_lora(output / "middle", tmp_path / "lora")
    tokens = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(7))
    adapted = PeftModel.from_pretrained(build_model(), output / "middle").eval()
    expected = adapted(tokens).logits
    as_lora = PeftModel.from_pretrained(build_model(), tmp_path / "lora").eval()(tokens).logits
    merged = adapted.merge_and_unload()(tokens).logits
    # logits below 1 through some hundred roundings of 6e-8, the change formed in another order
    torch.testing.assert_close(as_lora, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_a_gradient_that_is_not_finite_is_named_with_its_process_and_layers(together: tuple[str, Path, str]) -> None:
    engine, output, printed = together
    origin = "not finite on rank 1 in 7 of 14 layers, the last of them model.layers.0.mlp.down_proj"
    errors = [process["error"] for process in report(output)["processes"]]
    if engine.startswith("zero"):  # DeepSpeed leaves the step out itself
        assert errors == ["nothing", "nothing"]
        assert f"Optimizer step 4 was left out, because a gradient is not finite. Before reduction and clipping it was {origin}" in printed  # fmt: skip  # noqa: E501
        assert "Optimizer step 3 was left out" not in printed
    else:
        assert all(origin in error and "in optimizer step 4" in error for error in errors)
        assert all("the step was not taken" in error for error in errors)


def test_merging_where_the_engine_cannot_have_it_is_refused_in_words(together: tuple[str, Path, str]) -> None:
    engine, output, _ = together
    words = {"zero3": "partitioned over processes", "fsdp2": "call unmerge_adapter() before the next forward"}
    assert all(words.get(engine, "nothing") in process["misuse"] for process in report(output)["processes"])


def test_frozen_factors_are_sharded_by_fsdp2_and_whole_elsewhere(together: tuple[str, Path, str], alone: Path) -> None:
    engine, output, _ = together
    whole = report(alone)["processes"][0]
    processes = report(output)["processes"]
    tensors = 14 * 7
    if engine == "fsdp2":
        assert sum(process["frozen"] for process in processes) == whole["frozen"]
        # an odd number of rows leaves one row of r = 4 more on the first process
        assert max(process["frozen"] for process in processes) <= whole["frozen"] / 2 + tensors * 4 / 2
    else:
        assert {process["frozen"] for process in processes} == {whole["frozen"]}
    # per layer of out x in at rank r: U0, S0, V0 and the fingerprint
    shapes = {"q": (32, 32, 3), "k": (16, 32, 4), "v": (16, 32, 4), "o": (32, 32, 4), "gate": (49, 32, 4)}
    shapes |= {"up": (49, 32, 4), "down": (32, 49, 4)}
    assert whole["frozen"] == 2 * sum((m + n + 1) * r + m for m, n, r in shapes.values())
    assert whole["offsets"] == 2 * sum((m + n + 1) * r for m, n, r in shapes.values())
