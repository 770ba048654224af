"""QSORSA: a quantised base that stores the residual of the weights whose largest triplets its adapter trains."""
