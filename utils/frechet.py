"""Frechet distance between two sets of feature vectors, each taken as a Gaussian."""

import numpy as np
from scipy import linalg


class GaussianFit:
    """Mean and covariance of vectors of one length D that arrive in batches, summed in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = self._outer = np.zeros(())

    def add(self, vectors: np.ndarray) -> None:
        """Take in vectors (n,D)."""
        vectors = vectors.astype(np.float64)
        self.count += len(vectors)
        self._sum = self._sum + vectors.sum(axis=0)
        self._outer = self._outer + vectors.T @ vectors

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """(D,) and the unbiased (D,D); needs at least two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, there are {self.count}")
        mean = self._sum / self.count
        covariance = (self._outer - self.count * np.outer(mean, mean)) / (self.count - 1)
        return mean, covariance


def frechet_distance(a: GaussianFit, b: GaussianFit) -> float:
    """|m_a - m_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)), as in the Frechet Inception Distance."""
    mean_a, covariance_a = a.mean_and_covariance()
    mean_b, covariance_b = b.mean_and_covariance()
    # The root of the product has the same trace as that of the symmetric C_a^(1/2) C_b C_a^(1/2), whose eigenvalues
    # are real and not negative but for rounding: no complex parts to discard, no failure for singular covariances.
    values, vectors = linalg.eigh(covariance_a)
    root_a = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    product = linalg.eigvalsh(root_a @ covariance_b @ root_a)
    trace_of_root = np.sqrt(product.clip(min=0.0)).sum()
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * trace_of_root)
