"""The kinds of base modules that SORSA adapts, one kind a file, whose `sorsa_layer` hook says what it takes."""
