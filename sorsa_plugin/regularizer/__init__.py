"""Gets the orthonormal regularizer into an optimizer step, under any trainer or engine."""
