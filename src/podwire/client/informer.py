"""A local copy of one kind, kept true by list and watch, with a callback for every change."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Generic, TypeVar

import msgspec

from podwire.client.api import ApiClient, WatchEvent
from podwire.client.backoff import Backoff
from podwire.client.errors import ApiError, Gone, TooManyRequests, Unavailable
from podwire.client.served import OlderVersion, decode_served, list_served
from podwire.model.ids import ObjectKey
from podwire.model.meta import Json
from podwire.model.objects import ApiObject
from podwire.model.resources import Resource

log = logging.getLogger(__name__)

T = TypeVar("T", bound=ApiObject)


STEADY_SECONDS = 10.0
"""A watch that lasted so long shows that all is well with the server, whether anything happened or not."""

MAX_RETRY_AFTER = 30.0
"""Seconds: a server that asks for more is asked again after so many all the same."""


@dataclass(frozen=True, slots=True)
class Change(Generic[T]):
    """What happened to one object: `old` is None when it appeared, `new` when it went. An object that was replaced by another
    of the same name (another uid) comes as two changes."""

    key: ObjectKey
    old: T | None
    new: T | None

    @property
    def object(self) -> T:
        """The newest state there is."""
        found = self.new if self.new is not None else self.old
        assert found is not None
        return found


class _Bookmark(msgspec.Struct):
    metadata: "_BookmarkMeta"


class _BookmarkMeta(msgspec.Struct, rename="camel"):
    resource_version: str = ""


_bookmark_decoder = msgspec.json.Decoder(_Bookmark)


class Informer(Generic[T]):
    """All objects of `resource` (in `namespace`, matching the selectors) as values of `type`, current while `run()` runs.

    Callbacks are synchronous and called in the order of events; the copy is already changed when they are. `rng` spreads
    reconnects of many informers in time. Where the server has the kind in an older version only (`client.served`), that is
    asked for, and the objects are as of `resource` all the same.
    """

    def __init__(
        self,
        client: ApiClient,
        resource: Resource,
        type: type[T],
        *,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
        rng: Random | None = None,
    ) -> None:
        self.resource = resource
        self.resource_version = ""
        """The copy shows everything up to there; kept while the server has to be listed again."""
        self.changed_version = ""
        """The copy became what it is at that revision or before: unlike `resource_version`, bookmarks leave it as it is."""
        self._news = False
        self._watchable = False
        self._client = client
        self._namespace = namespace
        self._labels, self._fields = label_selector, field_selector
        self._decoder: msgspec.json.Decoder[T] = msgspec.json.Decoder(type)
        self._rng = rng or Random()
        self._older: OlderVersion | None = None
        self._objects: dict[ObjectKey, T] = {}
        self._callbacks: list[Callable[[Change[T]], None]] = []
        self._synced = asyncio.Event()
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []

    # --- reading --------------------------------------------------------------------------------------------------

    def get(self, key: ObjectKey) -> T | None:
        return self._objects.get(key)

    def items(self) -> Mapping[ObjectKey, T]:
        """A live, read-only view of all objects."""
        return MappingProxyType(self._objects)

    @property
    def selects(self) -> bool:
        """Whether it has only a part of all objects."""
        return bool(self._namespace or self._labels or self._fields)

    @property
    def has_synced(self) -> bool:
        return self._synced.is_set()

    async def synced(self) -> None:
        """Returns once the first list is in (and its callbacks have been called)."""
        await self._synced.wait()

    async def caught_up(self, written: Json, timeout_seconds: float = 5.0) -> bool:
        """Waits until the copy reflects a write, given the document that the write returned: read your own writes.

        False if that did not happen in time (or the write lies outside this informer's selection and nothing else happened).
        """
        version = _number(str(written.get("metadata", {}).get("resourceVersion", "")))
        if version <= _number(self.resource_version):
            return True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (version, future)
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_seconds):
                await future
        except TimeoutError:
            return False
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        return True

    def subscribe(self, callback: Callable[[Change[T]], None]) -> Callable[[], None]:
        """Calls `callback` for what exists already and then for every change. Returns what ends the subscription."""
        for key, obj in list(self._objects.items()):
            callback(Change(key, None, obj))
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    # --- running --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """List and watch until cancelled; every failure is logged, waited out and retried."""
        backoff = Backoff(self._rng, maximum=5.0)
        while True:
            try:
                if not self._watchable:
                    await self._list()
                await self._watch(backoff)
            except Gone:
                log.info("%s: history is gone, listing again", self.resource.plural)
                self._watchable = False
            except ApiError as error:
                if not isinstance(error, Unavailable | TooManyRequests):
                    # It may be the revision that the server objects to (one from before its data was restored, say).
                    self._watchable = False
                delay = max(backoff.next(), min(error.retry_after, MAX_RETRY_AFTER))
                log.warning("%s: %s; next attempt in %.2f s", self.resource.plural, error, delay)
                await asyncio.sleep(delay)

    async def _list(self) -> None:
        raw, self._older = await list_served(
            self._client, self.resource, self._namespace, label_selector=self._labels, field_selector=self._fields
        )
        fresh = {obj.key: obj for item in raw.items or () if (obj := self._decode(item)) is not None}
        self._news = False
        for key in [key for key in self._objects if key not in fresh]:
            self._change(key, None)
        for key, obj in fresh.items():
            self._change(key, obj)
        if self._news or not self.changed_version:
            self.changed_version = raw.metadata.resource_version
        self._reached(raw.metadata.resource_version)
        self._watchable = True
        self._synced.set()

    async def _watch(self, backoff: Backoff) -> None:
        events = self._client.watch(
            self._older.resource if self._older is not None else self.resource,
            self._namespace,
            resource_version=self.resource_version,
            timeout_seconds=300 + self._rng.randrange(300),
            label_selector=self._labels,
            field_selector=self._fields,
        )
        loop = asyncio.get_running_loop()
        opened, good = loop.time(), False
        try:
            async with aclosing(events):
                async for event in events:
                    good = True
                    backoff.reset()
                    self._event(event)
        finally:
            if loop.time() - opened >= STEADY_SECONDS:
                good = True
                backoff.reset()
        if not good:
            # A server that ends watches at once must not be asked in a tight loop.
            await asyncio.sleep(backoff.next())

    def _event(self, event: WatchEvent) -> None:
        if event.type == "BOOKMARK":
            self._reached(_bookmark_decoder.decode(event.object).metadata.resource_version)
            return
        obj = self._decode(event.object)
        if obj is None:
            return
        self._change(obj.key, None if event.type == "DELETED" else obj)
        self.changed_version = obj.metadata.resource_version
        self._reached(obj.metadata.resource_version)

    def _reached(self, resource_version: str) -> None:
        self.resource_version = resource_version
        if not self._waiters:
            return
        reached = _number(resource_version)
        for version, future in [waiter for waiter in self._waiters if waiter[0] <= reached]:
            self._waiters.remove((version, future))
            if not future.done():
                future.set_result(None)

    def _change(self, key: ObjectKey, new: T | None) -> None:
        old = self._objects.get(key)
        if new is None:
            if old is not None:
                del self._objects[key]
                self._tell(Change(key, old, None))
            return
        if old is not None and old.metadata.uid != new.metadata.uid:
            del self._objects[key]
            self._tell(Change(key, old, None))
            old = None
        if old is not None and old.metadata.resource_version == new.metadata.resource_version:
            return
        self._objects[key] = new
        self._tell(Change(key, old, new))

    def _tell(self, change: Change[T]) -> None:
        self._news = True
        for callback in tuple(self._callbacks):
            try:
                callback(change)
            except Exception:
                # The boundary of one subscriber: its bug must end neither the copy nor the others' subscriptions.
                log.exception("%s %s: a subscriber failed", self.resource.plural, change.key)

    def _decode(self, raw: msgspec.Raw) -> T | None:
        return decode_served(self._decoder, raw, self._older)


def _number(resource_version: str) -> int:
    """Revisions of one server are numbers that grow (KEP-5504); anything else cannot be waited for and counts as reached."""
    return int(resource_version) if resource_version.isdecimal() else 0
