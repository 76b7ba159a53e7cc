"""Keys to work on: coalesced while they wait, never worked on twice at once, with back-off for those that failed."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Hashable
from random import Random
from typing import Generic, TypeVar

from podwire.client.backoff import Backoff
from podwire.client.errors import Unavailable

log = logging.getLogger(__name__)

AWAY_DELAY = 2.0
"""Seconds at most between attempts while the server does not answer."""

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """A set of dirty keys in order of arrival.

    `add` is free for a key that waits already; a key added while it is worked on is worked on once more afterwards.
    Delayed keys wait in the event loop's timers, not in a poll; `rng` spreads the back-off,
    `name` says in the log whose keys they are.
    """

    def __init__(
        self, rng: Random | None = None, *, name: str = "work", initial_delay: float = 0.01, maximum_delay: float = 30.0
    ) -> None:
        self._rng, self._name = rng or Random(), name
        self._delays = (initial_delay, maximum_delay)
        self._waiting: dict[K, None] = {}
        self._active: set[K] = set()
        self._again: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._backoffs: dict[K, Backoff] = {}
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        """Keys that wait or are worked on now (not those whose delay still runs)."""
        return len(self._waiting) + len(self._active)

    def add(self, key: K) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        if key in self._active:
            self._again.add(key)
            return
        self._waiting[key] = None
        self._wake.set()

    def add_after(self, key: K, seconds: float) -> None:
        """`add`, later; an earlier `add` or `add_after` of the same key wins."""
        if seconds <= 0:
            self.add(key)
            return
        if key in self._waiting:
            return
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= loop.time() + seconds:
                return
            timer.cancel()
        self._timers[key] = loop.call_later(seconds, self.add, key)

    async def get(self) -> K:
        """The next key; the caller must end with `done` or `failed`."""
        while not self._waiting:
            self._wake.clear()
            await self._wake.wait()
        key = next(iter(self._waiting))
        del self._waiting[key]
        self._active.add(key)
        return key

    def done(self, key: K) -> None:
        self._backoffs.pop(key, None)
        self._release(key)

    def failed(self, key: K, *, at_most: float = math.inf) -> float:
        """Puts `key` back after its back-off, but `at_most` so many seconds; returns that delay."""
        backoff = self._backoffs.get(key)
        if backoff is None:
            initial, maximum = self._delays
            backoff = self._backoffs[key] = Backoff(self._rng, initial=initial, maximum=maximum)
        delay = min(backoff.next(), at_most)
        again = key in self._again
        self._release(key)
        if not again:
            self.add_after(key, delay)
        return delay

    def _release(self, key: K) -> None:
        self._active.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    async def run(
        self, work: Callable[[K], Awaitable[None]], *, expected: tuple[type[Exception], ...], workers: int = 1
    ) -> None:
        """Work on keys until cancelled, failures retried with back-off. `expected` ones are logged in a line, others whole."""
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(self._worker(work, expected))

    async def _worker(self, work: Callable[[K], Awaitable[None]], expected: tuple[type[Exception], ...]) -> None:
        while True:
            key = await self.get()
            try:
                await work(key)
            except expected as error:
                # A server that was away is no reason to doubt the key: work goes on soon after it is back.
                delay = self.failed(key, at_most=AWAY_DELAY if isinstance(error, Unavailable) else math.inf)
                log.log(
                    logging.INFO if delay < 1 else logging.WARNING, "%s %s: %s; again in %.2f s", self._name, key, error, delay
                )
            except Exception:
                # The boundary of one key's work: an object that nobody foresaw must not hold up all the others.
                log.exception("%s %s failed; again in %.2f s", self._name, key, self.failed(key))
            except BaseException:
                self._release(key)
                raise
            else:
                self.done(key)

    def close(self) -> None:
        """Cancel the timers of delayed keys."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
