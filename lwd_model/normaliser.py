"""Standardisation of observations: statistics from data, fixed from then on, and known by their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError, CorruptDataError

STD_FLOOR = 1e-2  # an entry that hardly moves in the data must not become a lever at deployment
CLIP = 10.0  # standard deviations


@dataclass(frozen=True)
class Normaliser:
    """z = clip((o - mean)/std, ±10).

    Attributes:
        mean, std: (D,) float32; std is at least 0.01.
    """

    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]

    @classmethod
    def fit(cls, observations: Iterable[npt.NDArray[np.float32]]) -> Normaliser:
        """Statistics of many (T, D) arrays, in one pass and float64.

        Raises:
            ConfigError: no data. CorruptDataError: a value is not finite.
        """
        count, total, square = 0, np.zeros(0), np.zeros(0)
        origin = np.zeros(0)
        for array in observations:
            if not np.isfinite(array).all():
                raise CorruptDataError("an observation is not finite", "validate the episodes before training")
            if count == 0:  # shifted by a first guess of the mean: the difference of squares keeps its digits
                origin = array.mean(0, dtype=np.float64)
                total, square = np.zeros_like(origin), np.zeros_like(origin)
            shifted = array.astype(np.float64) - origin
            count += len(array)
            total += shifted.sum(0)
            square += np.square(shifted).sum(0)
        if count == 0:
            raise ConfigError("no observations to take statistics from", "collect demonstrations before training")
        mean = total / count
        std = np.sqrt(np.maximum(square / count - mean**2, 0.0))
        return cls((origin + mean).astype(np.float32), np.maximum(std, STD_FLOOR).astype(np.float32))

    def __call__(self, observations: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """(…, D) -> (…, D) float32."""
        return np.clip((observations - self.mean) / self.std, -CLIP, CLIP)

    @property
    def digest(self) -> str:
        """sha256 of the statistics: two policies with equal digests see the same inputs."""
        data = np.concatenate([self.mean, self.std]).astype("<f4").tobytes()
        return hashlib.sha256(data).hexdigest()
