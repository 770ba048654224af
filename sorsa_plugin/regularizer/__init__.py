"""Gets the orthonormal regularizer into an optimizer step, whatever trainer or engine takes it."""
