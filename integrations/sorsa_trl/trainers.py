"""Ready-made trainers: TRL's SFT and DPO trainers with the orthonormal loss."""

from __future__ import annotations

from .loss import with_orthonormal_loss
from .requirement import require_trl

require_trl()

from trl import DPOTrainer, SFTTrainer  # noqa: E402

SORSASFTTrainer = with_orthonormal_loss(SFTTrainer)
SORSADPOTrainer = with_orthonormal_loss(DPOTrainer)
