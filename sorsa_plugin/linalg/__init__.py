"""The paper on plain tensors: the SVD, the change L R^T, orthonormality, fingerprints, spectra; knows no layer."""
