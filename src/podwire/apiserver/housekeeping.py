"""The server's regular work: forget old history, remove old Events."""

import asyncio
import logging
from collections import deque
from datetime import datetime, timedelta

import msgspec

from podwire.apiserver.config import ServerConfig
from podwire.apiserver.hub import Hub
from podwire.apiserver.storage import prefix_of
from podwire.model.resources import EVENTS
from podwire.model.timestamps import parse_time
from podwire.store.port import Delete, Store, StoreClosed, StoreError

_log = logging.getLogger(__name__)

ROUNDS_PER_HISTORY = 10
EVENTS_PER_COMMIT = 100


class History:
    """Which revision was current when, so that history goes by age."""

    def __init__(self, keep: timedelta) -> None:
        self._keep = keep
        self._marks: deque[tuple[datetime, int]] = deque()

    def mark(self, now: datetime, revision: int) -> int:
        """Note `revision` as current at `now`; the newest revision that was already current `keep` ago, 0 if unknown."""
        self._marks.append((now, revision))
        old = 0
        while self._marks and self._marks[0][0] <= now - self._keep:
            old = self._marks.popleft()[1]
        return old


async def keep_house(store: Store, hub: Hub, config: ServerConfig) -> None:
    """Runs until the store is closed or the task is cancelled."""
    history = History(timedelta(seconds=config.history_seconds))
    while True:
        try:
            now = config.now()
            old = history.mark(now, await store.revision())
            if old:
                await store.compact(old)
                hub.trim(old)
            await remove_old_events(store, now - timedelta(seconds=config.event_seconds))
        except StoreClosed:
            return
        except StoreError as error:
            _log.warning("housekeeping of the store is put off: %s", error)
        except Exception:
            # The task's boundary: the next round is worth trying whatever went wrong in this one.
            _log.exception("housekeeping of the store failed")
        await asyncio.sleep(config.history_seconds / ROUNDS_PER_HISTORY)


async def remove_old_events(store: Store, before: datetime) -> int:
    """Remove Events that last changed before `before`; how many they were."""
    removed, after, more = 0, "", True
    while more:
        page = await store.list(prefix_of(EVENTS), limit=EVENTS_PER_COMMIT, start_after=after)
        more = page.more
        after = page.items[-1].key if page.items else after
        old = [Delete(item.key) for item in page.items if last_seen(item.value) < before]
        if old:
            await store.commit(old)
            removed += len(old)
        # A page is read at once; requests come in between.
        await asyncio.sleep(0)
    return removed


class _Metadata(msgspec.Struct, rename="camel"):
    creation_timestamp: str


class _Event(msgspec.Struct, rename="camel"):
    metadata: _Metadata
    last_timestamp: str | None = None


def last_seen(value: bytes) -> datetime:
    """When a stored Event was last recorded."""
    event = msgspec.json.decode(value, type=_Event)
    return parse_time(event.last_timestamp or event.metadata.creation_timestamp)
