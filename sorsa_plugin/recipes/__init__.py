"""`adapter: word` in a recipe becomes a PEFT config."""
