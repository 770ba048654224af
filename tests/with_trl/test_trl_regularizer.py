"""With `peft_config` alone, every trainer of TRL applies the regularizer: what docs/trl.md's table says was run."""

from __future__ import annotations

import pytest
from builders.trl_runs import TRAINERS, adapter_config, build, logged

from sorsa_plugin import gaps
from sorsa_plugin.regularizer.optimizers import innermost
from sorsa_plugin.regularizer.step_hooks import attachment_of

STEPS = 3


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_regularizer_is_applied_once_per_optimizer_step(kind, tmp_path):
    """Counted on the optimizer, at accumulation 2; and the gaps end up smaller than without it."""
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    changes = {"max_steps": STEPS, "learning_rate": 3e-3, **accumulated}
    regularized = build(kind, tmp_path / "a", adapter_config("SORSA", kind, gamma=0.05), **changes)
    without = build(kind, tmp_path / "b", adapter_config("SORSA", kind, gamma=0.0), **changes)
    regularized.train()
    without.train()
    assert attachment_of(innermost(regularized.optimizer)).steps == STEPS
    assert len(logged(regularized, "loss")) == STEPS
    free = sum(gaps(without.model).values())
    assert free > 0.01
    assert sum(gaps(regularized.model).values()) < free
