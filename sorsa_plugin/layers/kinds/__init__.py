"""The kinds of base modules that SORSA adapts, one kind a file. Each file's `sorsa_layer` hook says which modules it
takes."""
