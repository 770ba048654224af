"""What lies on disk: adapters, base checkpoints, runs; one tensor at a time, and no model in memory."""
