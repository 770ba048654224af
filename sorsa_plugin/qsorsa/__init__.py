"""QSORSA: a quantised base that stores the residual of the weights that its adapter trains."""
