"""The base model of `make quickstart`: its corpus, tokenizer, pre-training and fine-tuning task."""
