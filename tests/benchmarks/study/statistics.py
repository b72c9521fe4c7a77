"""Intervals: a paired bootstrap over episodes, and Wilson's for shares."""

import math
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(errors: np.ndarray, baseline: np.ndarray, draws: int = 10_000, seed: int = 0) -> Interval:
    """Mean error relative to that of a baseline, bootstrapped over episodes.

    Both arms keep the same episodes in each draw (paired), and all training seeds (which are averaged, not
    drawn: three are too few).

    Args:
        errors, baseline: (training seeds, episodes) of the same held-out episodes.
    """
    return _paired(errors.mean(0), baseline.mean(0), np.divide, draws, seed)


def difference(values: np.ndarray, baseline: np.ndarray, draws: int = 10_000, seed: int = 0) -> Interval:
    """Mean value minus that of a baseline, bootstrapped over starts in the same way."""
    return _paired(values.mean(0), baseline.mean(0), np.subtract, draws, seed)


def _paired(ours: np.ndarray, theirs: np.ndarray, compare: np.ufunc, draws: int, seed: int) -> Interval:
    chosen = np.random.default_rng(seed).integers(len(ours), size=(draws, len(ours)))
    low, high = np.percentile(compare(ours[chosen].mean(1), theirs[chosen].mean(1)), [2.5, 97.5])
    return Interval(float(compare(ours.mean(), theirs.mean())), float(low), float(high))


def wilson(count: int, n: int, z: float = 1.959964) -> Interval:
    """A share and its interval."""
    p = count / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))
