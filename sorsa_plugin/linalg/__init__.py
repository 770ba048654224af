"""The paper on plain tensors: SVD, the change L R^T, orthonormality, fingerprints and spectra; knows no layer."""
