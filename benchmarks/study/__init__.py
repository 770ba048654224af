"""The study: does SORSA learn more, or forget less, than LoRA and its relatives? Each tuned alike, on real weights."""
