"""The embedded base model of `make quickstart`: its corpus, its tokenizer, its pre-training and a task on it."""
