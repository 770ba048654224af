"""SORSA on bitsandbytes' quantised linear layers; imports bitsandbytes only when one is met."""
