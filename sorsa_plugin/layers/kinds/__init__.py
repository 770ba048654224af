"""The kinds of base modules that SORSA adapts, one file a kind. Their `sorsa_layer` hooks say what is of which."""
