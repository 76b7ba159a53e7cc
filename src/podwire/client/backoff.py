"""Waiting longer and longer, never in step with others."""

from random import Random


class Backoff:
    """Delays in seconds: `initial`, doubling up to `maximum`, each spread by ±`jitter` of itself; `rng` is the only chance."""

    def __init__(self, rng: Random, *, initial: float = 0.05, maximum: float = 10.0, jitter: float = 0.3) -> None:
        self._rng = rng
        self._initial, self._maximum, self._jitter = initial, maximum, jitter
        self._next = initial

    def next(self) -> float:
        delay = self._next * (1 + self._jitter * (2 * self._rng.random() - 1))
        self._next = min(self._next * 2, self._maximum)
        return delay

    def reset(self) -> None:
        self._next = self._initial
