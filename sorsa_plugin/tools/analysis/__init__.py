"""Measures what training did to singular values and vectors, as the paper does."""
