"""A weight that carries adapters; its kinds are in `kinds`, one a file."""
