"""`sorsa quickstart`: trains an adapter on an embedded base model, on a task that the base model cannot do."""
