"""Turns `adapter: word` in a recipe into a PEFT config and the callbacks that go with it."""
