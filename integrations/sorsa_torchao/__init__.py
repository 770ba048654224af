"""SORSA on torchao's int8 weight-only linear layers; imports torchao only when a model has one."""
