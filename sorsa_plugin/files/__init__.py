"""Reads and writes what lies on disk: adapters, base checkpoints, runs. One tensor at a time, no model in memory."""
