"""Every private attribute of DeepSpeed that the integration reads is there, on engines that run."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.processes import report, run

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizers_and_parameters_have_what_is_read(stage: int, tmp_path: Path) -> None:
    from sorsa_distributed.deepspeed_compat import ENTRIES, STAGE_3_CLASS, STAGE_12_CLASS

    run("compat_worker.py", 2, str(tmp_path), str(stage))
    found = report(tmp_path)
    assert found["class"] == (STAGE_3_CLASS if stage == 3 else STAGE_12_CLASS)
    assert found["missing"] == found["missing on parameters"] == []
    assert found["linked"] == (stage < 3)
    assert found["of parameters"] == ([True] if stage == 3 else [])
    assert found["driving"]
    assert found["loaded"]
    assert all(0 not in shape for shape in found["gathered"])
    assert any(0 in shape for shape in found["whole"]) == (stage == 3)
    assert set(ENTRIES) >= {"gathered", "zero_driving", "stage3_of", "is_linked"}
