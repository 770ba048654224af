"""Merges a saved adapter into a base model's files, one weight at a time."""
