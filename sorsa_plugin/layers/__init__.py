"""A weight that carries adapters: factors, states, merging and folding. `kinds` has one kind of base module a file."""
