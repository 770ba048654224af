"""An Axolotl plug-in for tests: hands `use_cpu`, which Axolotl has no key for, to the Trainer, so that bf16 runs here."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin


class CPUPlugin(BasePlugin):
    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"use_cpu": True}
