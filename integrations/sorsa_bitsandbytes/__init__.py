"""SORSA on bitsandbytes' quantised linear layers; imports bitsandbytes only when a model has one."""
