"""Fan-out of committed events to the watchers of one store, in commit order."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

from podwire.store.port import Event


class Subscription:
    """One watcher's queue of batches. It only grows while its reader does not run; the reader is expected to keep up."""

    def __init__(self) -> None:
        self._batches: deque[Sequence[Event]] = deque()
        self._wakeup = asyncio.Event()
        self._closed = False

    def put(self, batch: Sequence[Event]) -> None:
        self._batches.append(batch)
        self._wakeup.set()

    def close(self) -> None:
        self._closed = True
        self._wakeup.set()

    async def take(self) -> Sequence[Event] | None:
        """Everything that waits, as one batch; None at the end."""
        while not self._batches:
            if self._closed:
                return None
            self._wakeup.clear()
            await self._wakeup.wait()
        if len(self._batches) == 1:
            return self._batches.popleft()
        merged = [event for batch in self._batches for event in batch]
        self._batches.clear()
        return merged


class Broadcast:
    """The live watchers of a store."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()
        self._closed = False

    def publish(self, batch: Sequence[Event]) -> None:
        for subscription in self._subscriptions:
            subscription.put(batch)

    def close(self) -> None:
        self._closed = True
        for subscription in self._subscriptions:
            subscription.close()

    async def follow(
        self, prefix: str, from_revision: int, replay: Callable[[str, int], Sequence[Event]]
    ) -> AsyncGenerator[Sequence[Event], None]:
        """History as `replay(prefix, from_revision)` gives it, then what is published after it, without gap or repeat."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        if self._closed:
            subscription.close()
        try:
            seen = from_revision - 1
            batch: Sequence[Event] | None = replay(prefix, from_revision)
            while batch is not None:
                if batch:
                    seen = batch[-1].revision
                    yield batch
                taken = await subscription.take()
                batch = None if taken is None else [e for e in taken if e.revision > seen and e.key.startswith(prefix)]
        finally:
            self._subscriptions.discard(subscription)
